"""What a training run will take, before it is launched: `python -m rankwise.plan MODEL`.

Prints memory a process and time an epoch of preference training, and what to change where it does not fit. MODEL is a
folder with a config.json (no weights are read), a hub id, or one of the presets. `--measure` runs a few real steps on
random weights and prints what was predicted beside what was measured.

Example:
    python -m rankwise.plan llama-8b --precision bf16 --processes 8 --sharding fsdp \\
        --device cuda --device-memory 80 --tflops 400
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rankwise.plan.options import EFFICIENCY, parser
from rankwise.plan.presets import PRESETS
from rankwise.runtime import keep_freed_memory, spin_briefly
from rankwise.types import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from rankwise.plan.footprint import Shape
    from rankwise.plan.forecast import Forecast, Work
    from rankwise.rendering import TokenRow

# Share of a device's memory left free: what allocators lose between blocks, and products take as scratch; on a CPU
# some tenths of a GiB (docs/planning.md).
HEADROOM = {"cpu": 0.3, "cuda": 0.1}
GIB = 2**30


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 for a mistake of the user's."""
    options = parser().parse_args(arguments)
    keep_freed_memory()
    spin_briefly()
    try:
        plan = _plan(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(plan, indent=2))
    else:
        from rankwise.plan.table import show

        show(plan)
    return 0


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    """All that is to be told, as JSON-able values."""
    from rankwise.checkpoints import device
    from rankwise.plan.footprint import Shape
    from rankwise.plan.forecast import Work, forecast, largest_budget, remedies, whole_step
    from rankwise.plan.machine import process_memory

    here = device()
    kind = options.device or here.type
    process, memory, rate = process_memory(kind), *_machine(options, kind, here)
    shape = Shape(
        config=_config(options.model),
        precision=options.precision,
        lora_rank=options.lora_rank,
        gradient_checkpointing=options.gradient_checkpointing,
        processes=options.processes,
        sharding=options.sharding,
        device=kind,
    )
    work = Work(rows=_rows(options), batch_size=options.batch_size, micro_batch_tokens=options.micro_batch_tokens)
    efficiency = options.efficiency or EFFICIENCY[kind][options.precision]
    predict = lambda work: forecast(shape, work, flops_per_second=rate * efficiency, process_bytes=process)
    predicted = predict(work)
    room = int(memory * (1 - HEADROOM[kind])) - process
    fits = predicted.memory.peak <= room
    if options.measure:
        _check_measurable(shape, here, fits)
    return {
        "setup": {k: v for k, v in vars(options).items() if k not in ("json", "measure")} | {"device": kind},
        "device_bytes": memory,
        "headroom": HEADROOM[kind],
        "matmul_flops_per_second": rate,
        "efficiency": efficiency,
        "forecast": {**asdict(predicted), "total_bytes": predicted.total_bytes},
        "fits": fits,
        "whole_step_positions": whole_step(work),
        "largest_micro_batch_tokens": largest_budget(shape, work, room) if fits else None,
        "remedies": [] if fits else [asdict(remedy) for remedy in remedies(shape, work, room)],
        "measured": _measured(shape, work, predict, rate) if options.measure else None,
    }


def _machine(options: argparse.Namespace, kind: str, here: torch.device) -> tuple[int, float]:
    """Bytes of memory and FLOP/s of matrix products, of one process: as given, or as found here."""
    from rankwise.plan.machine import machine_memory, matmul_rate

    if kind != here.type and not (options.device_memory and options.tflops):
        raise UserError(
            f"--device {kind}: this machine has none to look at; give --device-memory (GiB) and --tflops (the rate of "
            f"its matrix products in {options.precision}, as measured, not as advertised)"
        )
    # Processes on one machine share its memory; each has a GPU of its own.
    sharers = options.processes if kind == "cpu" else 1
    memory = int(options.device_memory * GIB) if options.device_memory else machine_memory(here) // sharers
    return memory, options.tflops * 1e12 if options.tflops else matmul_rate(options.precision, here)


def _config(model: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    from rankwise.runtime import remote_code_allowed

    if model in PRESETS:
        return AutoConfig.for_model(**PRESETS[model])
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=remote_code_allowed())
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(
            f"{model}: no model ({reason}); a folder with a config.json, a hub id that is in the cache or within "
            f"reach, or one of {', '.join(PRESETS)} is expected"
        ) from error


def _rows(options: argparse.Namespace) -> list[TokenRow]:
    """The rows of a table as its tokenizer makes them, or as many of one shape as were asked for."""
    from rankwise.rendering import Renderer, TokenRow

    if options.preferences is None:
        answers = ((0,) * options.answer_tokens,) * options.k
        prompt = (0,) * options.prompt_tokens
        return [TokenRow(id=f"{i:09}", prompt_ids=prompt, answers_ids=answers) for i in range(options.rows)]
    from rankwise.checkpoints import load_tokenizer
    from rankwise.rows import read_rows

    if options.tokenizer is None and options.model in PRESETS:
        raise UserError(f"{options.preferences}: preset {options.model} has no tokenizer; name one with --tokenizer")
    renderer = Renderer(load_tokenizer(options.tokenizer or options.model))
    rows = [renderer.render(row, row.ranked) for row in read_rows(options.preferences) if len(row.ranked) > 1]
    if not rows:
        raise UserError(f"{options.preferences}: no row has two ranked answers, so there is nothing to train on")
    return rows


def _check_measurable(shape: Shape, here: torch.device, fits: bool) -> None:
    if shape.processes > 1 or shape.device != here.type:
        raise UserError(
            "--measure runs one process on this machine's own device; leave out --processes and --device, or plan "
            "without --measure"
        )
    if not fits:
        raise UserError("--measure: the plan does not fit into this machine; without --measure it says what would")


def _measured(shape: Shape, work: Work, predict: Callable[[Work], Forecast], rate: float) -> dict[str, Any]:
    """A few real steps, the largest micro-batch among them, beside what is predicted of those very rows."""
    from rankwise.plan.forecast import largest_part
    from rankwise.plan.rehearsal import STEPS, rehearse

    largest = largest_part(work)[0]
    known = {row.id for row in largest}
    others = [row for row in work.rows if row.id not in known]
    some = replace(work, rows=[*largest, *others][: STEPS * work.batch_size])
    predicted, seen = predict(some), rehearse(shape, some)
    return {
        "steps": predicted.steps,
        "predicted_bytes": predicted.memory.peak,
        "measured_bytes": seen.peak_bytes,
        "predicted_seconds_per_step": predicted.seconds / predicted.steps,
        "measured_seconds_per_step": seen.seconds / predicted.steps,
        "measured_efficiency": predicted.spent_flops / seen.seconds / rate,
    }


if __name__ == "__main__":
    raise SystemExit(main())
