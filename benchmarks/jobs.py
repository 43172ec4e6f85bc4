"""What a worker can be asked to do; each job imports what it needs, so that ours runs where TRL is not installed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.channel import Channel
from benchmarks.settings import OurSetting, TrlSetting, dividing
from benchmarks.workload import Case
from rankwise.plan import peak

Spec = dict[str, Any]


def steps(spec: Spec, channel: Channel, folder: str) -> None:
    """Optimizer steps, one a go."""
    _run("run_steps", spec, channel, folder)


def reference(spec: Spec, channel: Channel, folder: str) -> None:
    """Passes of the reference, one a go."""
    _run("run_reference", spec, channel, folder)


def _run(name: str, spec: Spec, channel: Channel, folder: str) -> None:
    case = Case.of(spec["case"])
    try:
        if spec["side"] == "ours":
            from benchmarks import ours

            getattr(ours, name)(case, OurSetting(**spec["setting"]), channel, peak.now(case.device))
        else:
            from benchmarks import theirs

            getattr(theirs, name)(case, TrlSetting(**spec["setting"]), channel, peak.now(case.device), folder)
    except torch.OutOfMemoryError:
        channel.say(out_of_memory=True)


def parity(spec: Spec, channel: Channel, folder: str) -> None:
    """Loss and gradient of one fp32 step, or the reference's numbers; arrays go into a file."""
    case = Case.of(spec["case"])
    what = spec["what"]
    if spec["side"] == "ours":
        from benchmarks import ours

        setting = OurSetting(precision="fp32", budget=4096)
        give = ours.logps if what == "logps" else partial(ours.gradients, beta=case.parity_beta)
        found = give(case, setting)
    else:
        from benchmarks import theirs

        micro = 1 if spec["packed"] else dividing(case.batch, case.batch // 2)
        setting = TrlSetting(precision="fp32", mode="eager", micro=micro, packed=spec["packed"])
        give = theirs.logps if what == "logps" else partial(theirs.gradients, beta=case.parity_beta)
        found = give(case, setting, folder)
    loss, values = found if what == "step" else (None, found)
    np.save(spec["file"], values)
    channel.say(loss=loss)


def facts(spec: Spec, channel: Channel, folder: str) -> None:
    """The machine, in what bears on speed and names nobody; and what this machine multiplies at most."""
    device = spec["device"]
    said: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "transformers", "trl")},
    }
    if spec["ceiling"]:
        from rankwise.plan.machine import matmul_rate

        where, side = torch.device(device), spec["ceiling"]
        said["matmul_flops"] = {kind: matmul_rate(kind, where, side=side) for kind in ("fp32", "bf16")}
    channel.say(**said)


def head(spec: Spec, channel: Channel, folder: str) -> None:
    """Forward and backward passes of one vocabulary head, one a go."""
    from benchmarks import heads

    try:
        heads.run(spec, channel)
    except torch.OutOfMemoryError:
        channel.say(out_of_memory=True)


def attention(spec: Spec, channel: Channel, folder: str) -> None:
    """Forward and backward passes of one way to attend within trees, one a go."""
    from benchmarks import attentions

    attentions.run(spec, channel)


def folder(spec: Spec, channel: Channel, folder: str) -> None:
    """The case's model, written for rollouts."""
    from benchmarks import models

    models.save(Case.of(spec["case"]), spec["folder"])
    channel.say()


def _sampling(name: str) -> Callable[[Spec, Channel, str], None]:
    def job(spec: Spec, channel: Channel, folder: str) -> None:
        from benchmarks import samplers

        try:
            getattr(samplers, name)(spec, channel)
        except torch.OutOfMemoryError:
            channel.say(out_of_memory=True)

    return job


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


JOBS: dict[str, Callable[[Spec, Channel, str], None]] = {
    "steps": steps,
    "reference": reference,
    "parity": parity,
    "facts": facts,
    "head": head,
    "attention": attention,
    "folder": folder,
    "rollouts": _sampling("run"),  # passes of an engine over all prompts, one a go
    "agree": _sampling("agree"),  # whether engines give the same greedy answers
}
