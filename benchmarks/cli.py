"""Options that the benchmarks share, and what follows from them: cases, settings, effort."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.arguments import count, our_setting, place, trl_setting
from benchmarks.choose import Trial, best_of_ours, best_of_trl
from benchmarks.contest import Effort, Worker
from benchmarks.report import say
from benchmarks.settings import OurSetting, TrlSetting, dividing
from benchmarks.workload import MODELS, Case
from rankwise.types import UserError

GROWTH = {
    "k": (2, 4, 8),
    "prompt": (32, 128, 512),
    "answer": (32, 96, 384),
    "vocabulary": (8_000, 32_000, 128_000),
    "batch": (4, 16, 64),
}
CEILING = {"cpu": 4096, "cuda": 16_384}  # side of the square matrices whose product is the machine's measure


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The settings that are timed, and the trials they were chosen by."""

    ours: OurSetting
    trl: TrlSetting | None  # None: TRL takes no part
    trials: list[Trial]

    def starts(self, case: Case, job: str = "steps") -> dict[str, Callable[[], Worker]]:
        """How to start each side's worker, as contest takes it."""
        sides = {"ours": self.ours} if self.trl is None else {"ours": self.ours, "trl": self.trl}
        return {
            side: partial(Worker, job=job, side=side, case=case.spec(), setting=setting.spec())
            for side, setting in sides.items()
        }

    def at(self, precision: str) -> Chosen:
        """The same settings in another precision."""
        trl = self.trl and replace(self.trl, precision=precision)
        return Chosen(ours=replace(self.ours, precision=precision), trl=trl, trials=[])

    def spec(self) -> dict[str, str | None]:
        return {"ours": str(self.ours), "trl": self.trl and str(self.trl)}


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--json",
        nargs="?",
        const="-",
        type=place,
        metavar="FILE",
        help="the record as JSON: to stdout, or to FILE",
    )
    made.add_argument("--quick", action="store_true", help="a tiny model, fixed settings: to see that it runs")
    made.add_argument("--rounds", type=count, help="steps of each side that count (9; 3 with --quick)")
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    made.add_argument("--seed", type=int, default=0, help="of weights and data (0)")
    return made


def add_case_options(made: argparse.ArgumentParser) -> None:
    """Model and data of the benchmarks that run one, and how long they do."""
    made.add_argument("--exclusive", action="store_true", help="one side in memory at a time, for models that fill it")
    made.add_argument("--budget", type=float, default=300.0, metavar="S", help="no new round after S seconds (300)")
    shape = made.add_argument_group("what is computed")
    shape.add_argument("--model", choices=MODELS, help="a Llama of this size with random weights (15m; 0.5b on cuda)")
    shape.add_argument("--batch", type=count, help="prompts: of an optimizer step (16), a table or a pass (64)")
    shape.add_argument("--prompt", type=count, help="median tokens of a prompt, lognormal (128)")
    shape.add_argument("--answer", type=count, help="median tokens of an answer, lognormal; of rollouts the mean (96)")
    shape.add_argument("--vocabulary", type=count, help="tokens (the model's own)")
    shape.add_argument("--weights", choices=("fp32", "bf16"), help="dtype of the parameters (fp32)", default="fp32")
    shape.add_argument("--vary", choices=GROWTH, help="a growth series: this one changes, the others stay")
    shape.add_argument("--values", type=count, nargs="+", metavar="N", help=f"values of --vary ({_growth()})")


def add_trl_options(made: argparse.ArgumentParser) -> None:
    """Whether TRL takes part."""
    made.add_argument("--ours-only", action="store_true", help="leave TRL out, as where it is not installed")


def add_trainer_options(made: argparse.ArgumentParser) -> None:
    """Settings of the benchmarks that train a model, or score with it, as TRL does."""
    add_case_options(made)
    add_trl_options(made)
    how = made.add_argument_group("settings")
    how.add_argument("--checkpointing", action="store_true", help="activation checkpointing, on both sides")
    how.add_argument("--our-setting", type=our_setting, metavar="S", help="as bf16-4096; default: tried out")
    how.add_argument("--trl-setting", type=trl_setting, metavar="S", help="as bf16-eager-8; default: tried out")


def case_of(options: argparse.Namespace, *, task: str = "dpo", k: int = 2) -> Case:
    """The case that the options describe."""
    options.device = device(options.device)
    if task == "dpo" and k < 2:
        raise UserError(f"--k {k}: a preference needs two answers at least; give 2 or more")
    name = options.model or ("tiny" if options.quick else "0.5b" if options.device == "cuda" else "15m")
    tokens = {"batch": 4, "prompt": 12, "answer": 8} if options.quick else {"batch": 16, "prompt": 128, "answer": 96}
    case = Case(
        task=task,
        name=name,
        shape=MODELS[name],
        k=k,
        seed=options.seed,
        device=options.device,
        weights=options.weights,
        checkpointing=getattr(options, "checkpointing", False),
        **tokens,
    )
    for field in ("batch", "prompt", "answer", "vocabulary"):
        if getattr(options, field) is not None:
            case = case.with_value(field, getattr(options, field))
    return case


def record(
    benchmark: str,
    options: argparse.Namespace,
    machine: dict[str, Any],
    parity: dict[str, Any] | None,
    chosen: Chosen,
    results: list[dict[str, Any]],
) -> dict[str, Any]:
    """What a benchmark of two sides found, and all that it takes to find it again."""
    return {
        "benchmark": benchmark,
        "options": told(options),
        "machine": machine,
        "parity": parity,
        "chosen": chosen.spec(),  # each result has the settings that ran
        "trials": chosen.trials,
        "results": results,
    }


def told(options: argparse.Namespace) -> dict[str, Any]:
    """The options for the record, so that it can be made again; without the place that it is written to."""
    given = {name: value for name, value in vars(options).items() if name != "json" and value is not None}
    return {name: _told(value) for name, value in given.items()}


def _told(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: str(setting) for name, setting in value.items()}
    return str(value) if isinstance(value, OurSetting | TrlSetting) else value


def series(options: argparse.Namespace, case: Case) -> list[Case]:
    """The cases of --vary; the case itself where nothing varies."""
    if options.vary is None:
        if options.values:
            raise UserError("--values says what --vary NAME shall take, and --vary is missing; add it")
        return [case]
    if options.vary == "k" and case.task == "sft":
        raise UserError("--vary k: an SFT row has one answer; vary prompt, answer, vocabulary or batch")
    values = options.values or GROWTH[options.vary]
    if options.vary == "k" and case.task == "dpo" and min(values) < 2:
        raise UserError(f"--vary k --values {min(values)}: a preference needs two answers at least; give 2 or more")
    return [case.with_value(options.vary, value) for value in values]


def effort(options: argparse.Namespace) -> Effort:
    """How long to measure."""
    rounds = options.rounds or (3 if options.quick else 9)
    return Effort(rounds=rounds, warmup=1 if options.quick else 2, budget_s=options.budget, exclusive=options.exclusive)


def choose(options: argparse.Namespace, case: Case, *, job: str = "steps") -> Chosen:
    """Settings given, or the best of each side in short trials."""
    trials: list[Trial] = []
    ours, trl = options.our_setting, options.trl_setting
    if options.quick:
        ours = ours or OurSetting(precision="fp32", budget=4096)
        trl = trl or TrlSetting(precision="fp32", mode="eager", micro=2)
    if ours is None:
        ours, tried = best_of_ours(case, job)
        trials += tried
    if not options.ours_only and trl is None:
        trl, tried = best_of_trl(case, job)
        trials += tried
    return Chosen(ours=ours, trl=None if options.ours_only else trl, trials=trials)


def fitted(chosen: Chosen, case: Case) -> Chosen:
    """The chosen settings with a micro-batch of TRL's that divides this case's step."""
    if chosen.trl is None or chosen.trl.packed:
        return chosen
    examples = case.batch if case.task == "sft" else case.batch * case.k * (case.k - 1) // 2
    return replace(chosen, trl=replace(chosen.trl, micro=dividing(examples, chosen.trl.micro)))


def machine(options: argparse.Namespace, *, ceiling: bool) -> dict[str, Any]:
    """What bears on speed here; with ceiling also the matmul rates, measured now."""
    say("machine: its versions" + (" and what it multiplies at most" if ceiling else ""))
    size = (256 if options.quick else CEILING[options.device]) if ceiling else 0
    with Worker(job="facts", device=options.device, ceiling=size) as worker:
        return worker.hear()


def need_trl(options: argparse.Namespace) -> None:
    """Say how to get TRL where it takes part and is missing."""
    if not options.ours_only and importlib.util.find_spec("trl") is None:
        raise UserError("TRL is not installed: pip install -e '.[bench]', or measure ours alone with --ours-only")


def command(main: Callable[[list[str]], None]) -> None:
    """Run a benchmark as a command: a mistake of the user's is a message and status 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _growth() -> str:
    return "; ".join(f"{name} {' '.join(map(str, values))}" for name, values in GROWTH.items())


def device(asked: str | None) -> str:
    """The device that was asked for, or cuda where there is one; raises UserError where what was asked for is not."""
    if asked == "cpu":
        return asked
    import torch

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise UserError("--device cuda: torch finds no CUDA device here; leave it out, or give --device cpu")
    return "cuda" if there else "cpu"
