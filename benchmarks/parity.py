"""Programs are timed against each other only if they compute the same thing: loss, gradient, answers in fp32."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contest import Worker
from benchmarks.report import say
from benchmarks.settings import EngineSetting
from benchmarks.workload import Case
from rankwise.types import UserError

LOSS, GRADIENT = 2e-6, 5e-6  # relative; TRL and the paper's code differ by 1.4e-6 and 2.3e-6 among themselves
LOGPS = 2e-6  # relative, of all answers' sums together
# Nats by which a greedy token may fall short of the likeliest one, which at a tie is rounding. The likeliest two are
# some tenths apart as a rule, so an answer to anything else shows. A server computes in whatever it was started with.
MARGIN, SERVED_MARGIN = 1e-3, 0.5
GREEDY_PROMPTS = 8


def step_parity(case: Case) -> dict[str, Any]:
    """Compare one fp32 step of both sides on a small piece of the case; raises UserError where they differ.

    SFT is compared with TRL's padded rows and with its packed ones, since either may be timed.
    """
    say("parity: one fp32 step of each side")
    small = case.for_parity()
    our_loss, ours = _one(small, "step", "ours")
    for packed in (False, True) if case.task == "sft" else (False,):
        trl_loss, theirs = _one(small, "step", "trl", packed=packed)
        told = check_step(our_loss, ours, trl_loss, theirs)
    return told


def reference_parity(case: Case) -> dict[str, Any]:
    """Compare the reference's log-probabilities of both sides; raises UserError where they differ."""
    say("parity: one fp32 pass of each side")
    small = case.for_parity()
    return check_logps(_one(small, "logps", "ours")[1], _one(small, "logps", "trl")[1])


def greedy_parity(
    case: Case, engines: Sequence[str], start: Callable[..., Worker]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Compare the engines' greedy answers to a few prompts; also those that cannot run here, and why.

    Every token must be the likeliest one after those before it, but for rounding. So answers that are not generate()'s
    to the last token part from them at a tie; the share that does not is in the record.

    Args:
        start: starts a worker on the case's model.

    Raises UserError where an engine answers otherwise.
    """
    say("parity: greedy answers of each engine")
    few = replace(case, batch=min(case.batch, GREEDY_PROMPTS))
    settings = {engine: _exact(engine, few).spec() for engine in engines}
    with start(job="agree", case=few.spec(), settings=settings) as worker:
        told = worker.hear()
    return {**check_greedy(told["margins"]), "equal_to_generate": told["equal"]}, told["left_out"]


def check_greedy(margins: Mapping[str, float]) -> dict[str, Any]:
    """The engines' margins, in nats; raises UserError beyond the limits."""
    limits = {engine: SERVED_MARGIN if engine == "server" else MARGIN for engine in margins}
    # Written so that NaN fails too.
    wrong = [engine for engine, limit in limits.items() if not margins[engine] <= limit]
    if wrong:
        raise UserError(
            "nothing is timed: "
            + "; ".join(
                f"a greedy token of {engine} is {margins[engine]:.2g} nats below the likeliest one, "
                f"{limits[engine]:.0e} is allowed"
                for engine in wrong
            )
            + ". The engine does not compute this model's answers; --engines leaves it out"
        )
    return {"of": " of greedy answers, nats", **margins, "limits": limits}


def _exact(engine: str, case: Case) -> EngineSetting:
    """As exact as the engine can be, with half the answers at a time, so that one batch follows another."""
    batch = max(1, case.batch // 2) * case.k
    precision = "own" if engine == "server" else "fp32"
    return EngineSetting(precision=precision, batch=batch, cache="dynamic" if engine == "generate" else "")


def check_step(our_loss: float, ours: np.ndarray, trl_loss: float, theirs: np.ndarray) -> dict[str, Any]:
    """How far loss and gradient lie apart, relative; raises UserError beyond the limits."""
    apart = {"loss": abs(our_loss - trl_loss) / abs(trl_loss), "gradient": _apart(ours, theirs)}
    return _checked(apart, {"loss": LOSS, "gradient": GRADIENT})


def check_logps(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """How far log-probabilities lie apart, relative; raises UserError beyond the limit."""
    return _checked({"logps": _apart(ours, theirs)}, {"logps": LOGPS})


def _checked(apart: dict[str, float], limits: dict[str, float]) -> dict[str, Any]:
    # Written so that NaN fails too.
    wrong = [name for name, limit in limits.items() if not apart[name] <= limit]
    if wrong:
        raise UserError(
            "nothing is timed: ours and TRL do not compute the same. "
            + "; ".join(
                f"{name} differs by {apart[name]:.2g} relative, {limits[name]:.0g} is allowed" for name in wrong
            )
            + ". One of the two is wrong, or TRL's rules changed with its version (1.16 is known to agree): "
            "tests/test_trl_parity.py compares them on a handful of rows"
        )
    return {**apart, "limits": limits}


def _one(case: Case, what: str, side: str, *, packed: bool = False) -> tuple[float | None, np.ndarray]:
    """What a side computes: the loss, and gradient or log-probabilities."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "values.npy"
        spec = {"case": case.spec(), "what": what, "file": str(file), "packed": packed}
        with Worker(job="parity", side=side, **spec) as worker:
            loss = worker.hear()["loss"]
        return loss, np.load(file)


def _apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        return float("nan")
    wide = theirs.astype(np.float64)
    return float(np.linalg.norm(ours - wide) / np.linalg.norm(wide))
