"""The options of `python -m rankwise.plan`; read without torch, so that --help answers at once."""

from __future__ import annotations

import argparse
import contextlib
import math

from rankwise.plan.presets import PRESETS

# Share of the measured matmul rate that a training step is assumed to reach; --measure prints the true one. A CPU's are
# those of docs/planning.md: where products are fast, what is none weighs more.
EFFICIENCY = {
    "cpu": {"fp32": 0.7, "medium": 0.4, "bf16": 0.4},
    "cuda": {"fp32": 0.4, "medium": 0.4, "bf16": 0.4},
}


def parser() -> argparse.ArgumentParser:
    """All options, with what holds where one is left out."""
    made = argparse.ArgumentParser(
        prog="python -m rankwise.plan",
        description="Predict memory and time of preference training before it is launched.",
        epilog="Units: positions and rows are counts, GiB = 2^30 bytes, TFLOP/s = 10^12 FLOP a second.",
    )
    add = made.add_argument
    add("model", help=f"folder with config.json, hub id, or one of {', '.join(PRESETS)}; no weights are read")
    rows = made.add_argument_group("rows: a table, or as many of one shape")
    rows.add_argument("--preferences", metavar="FILE", help="a table of ranked rows (Parquet)")
    rows.add_argument("--tokenizer", metavar="FOLDER", help="the tokenizer of --preferences; MODEL's own if left out")
    rows.add_argument("--rows", type=_count, default=1000, metavar="N", help="prompts an epoch (%(default)s)")
    rows.add_argument("--k", type=_count, default=2, metavar="K", help="answers a prompt (%(default)s)")
    rows.add_argument("--prompt-tokens", type=_count, default=128, metavar="N", help="of a prompt (%(default)s)")
    rows.add_argument("--answer-tokens", type=_count, default=96, metavar="N", help="of an answer (%(default)s)")
    how = made.add_argument_group("training, named as in params.yaml")
    how.add_argument("--precision", choices=("fp32", "medium", "bf16"), default="fp32", help="numerics (%(default)s)")
    how.add_argument("--batch-size", type=_count, default=16, metavar="N", help="rows a step (%(default)s)")
    how.add_argument("--micro-batch-tokens", type=_count, default=2048, metavar="N", help="positions (%(default)s)")
    how.add_argument("--gradient-checkpointing", action="store_true", help="compute activations twice")
    how.add_argument("--lora-rank", type=_rank, default=0, metavar="R", help="adapters of this rank; 0 trains all")
    where = made.add_argument_group("machine: as found here, or as given")
    where.add_argument("--processes", type=_count, default=1, metavar="N", help="of one launch (%(default)s)")
    where.add_argument(
        "--sharding", choices=("ddp", "fsdp"), default="ddp", help="a copy each, or a share (%(default)s)"
    )
    where.add_argument("--device", choices=("cpu", "cuda"), help="kind of device to plan for")
    where.add_argument("--device-memory", type=_amount, metavar="GIB", help="memory of a process's device")
    where.add_argument("--tflops", type=_amount, metavar="RATE", help="TFLOP/s of matrix products of one process")
    cpu, cuda = EFFICIENCY["cpu"], EFFICIENCY["cuda"]
    assumed = f"{cpu['fp32']} on a CPU in fp32, {cpu['bf16']} in bf16; {cuda['bf16']} on a GPU"
    where.add_argument("--efficiency", type=_share, metavar="SHARE", help=f"of that rate, up to 1 ({assumed})")
    add("--measure", action="store_true", help="run a few real steps on random weights and compare")
    add("--json", action="store_true", help="print everything as JSON")
    return made


def _count(text: str) -> int:
    return _whole(text, least=1)


def _rank(text: str) -> int:
    return _whole(text, least=0)


def _whole(text: str, *, least: int) -> int:
    with contextlib.suppress(ValueError):
        if (value := int(text)) >= least:
            return value
    raise argparse.ArgumentTypeError(f"a whole number of at least {least} is expected, found {text}")


def _amount(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"a number above 0 is expected, found {text}")


def _share(text: str) -> float:
    if (value := _amount(text)) > 1:
        raise argparse.ArgumentTypeError(f"a share of a rate is at most 1, found {text}")
    return value
