"""Two programs are timed against each other only if they compute the same thing: loss and gradient in fp32."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contest import Worker
from benchmarks.report import say
from benchmarks.workload import Case
from rankwise.types import UserError

LOSS, GRADIENT = 2e-6, 5e-6  # relative; TRL and the paper's code differ by 1.4e-6 and 2.3e-6 among themselves
LOGPS = 2e-6  # relative, of all answers' sums together


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
