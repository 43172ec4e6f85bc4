"""What makes a training run kill-safe: checkpoints that know whose they are, and signals held until a step is whole.

A checkpoint is one safetensors file: weights, optimizer, and notes (step, counters, curves, identity). The first
process alone writes and reads it, tensor by tensor, so it is the same file whatever the number of processes and
whether or not they shard, no process holds more than one whole tensor of it, and hosts need not share a disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rankwise.checkpoints import DTYPES, load_state, save_state
from rankwise.json_text import whole_characters
from rankwise.parallel import Processes, plain, receive
from rankwise.rendering import TokenRow
from rankwise.types import UserError

# What notes hold, beside what the identity names.
NOTES = {"identity": dict, "step": int, "epochs_told": int, "counters": dict, "points": list}
COUNTERS = ("tokens", "seen", "seconds")
FROZEN_SAMPLE = 64  # about how many numbers of each frozen tensor tell it from another model's


def rows_digest(rows: Sequence[TokenRow]) -> str:
    """Identity of training rows: ids, tokens and ranks, in their order, since the shuffle starts from it."""
    hasher = hashlib.sha256()
    for row in rows:
        parts = (row.prompt_ids, row.ranks, *row.answers_ids)
        hasher.update(json.dumps([row.id, *map(len, parts)]).encode("utf-8", "surrogatepass"))
        for part in parts:
            hasher.update(array("q", part).tobytes())
    return hasher.hexdigest()[:32]


def frozen_digest(module: nn.Module) -> str:
    """Identity of the weights that training leaves alone and no checkpoint holds; "" where there are none.

    Of each tensor it reads a few dozen numbers, spread evenly: two models differ nearly everywhere, and a whole base
    model would take longer to read than to load. All processes call.
    """
    hasher = hashlib.sha256()
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    for name, p in frozen.items():
        flat = plain(p.detach()).flatten()
        sample = flat[:: max(1, len(flat) // FROZEN_SAMPLE)].double().cpu()
        hasher.update(json.dumps([name, *p.shape]).encode() + sample.numpy().tobytes())
    return hasher.hexdigest()[:32] if frozen else ""


def differences(theirs: Mapping[str, str], mine: Mapping[str, str]) -> list[str]:
    """Each name of which a checkpoint's identity and a run's differ, with both values; names on one side differ."""
    names = [name for name in {**mine, **theirs} if theirs.get(name) != mine.get(name)]
    return [
        f"{name}: it says {theirs.get(name, 'nothing')}, this run has {mine.get(name, 'nothing')}" for name in names
    ]


def save(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, notes: dict, here: Processes
) -> None:
    """Write a checkpoint; all processes call, the first one writes, aside and then in path's place."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, p in parameters.items():
            yield f"weight/{name}", p
            for key, value in optimizer.state.get(p, {}).items():
                yield f"optimizer/{name}/{key}", torch.as_tensor(value)

    if here.first:
        aside = path.with_suffix(".tmp")
        save_state(aside, dict(tensors()), notes, whole=plain)
        os.replace(aside, path)
        return
    for _, tensor in tensors():
        plain(tensor)


def load(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, str],
    here: Processes,
) -> dict[str, Any] | None:
    """Take weights and optimizer from a checkpoint; returns its notes, or None where there is no checkpoint.

    Raises:
        UserError: the file is damaged, of another identity, or of another model; in every process alike.
    """
    saved: Mapping[str, Tensor] = {}
    header: dict[str, Any] = {}
    if here.first and path.exists():
        try:
            saved, notes = load_state(path)
            _check_notes(path, notes)
            with safe_open(path, framework="pt") as file:  # shapes without the numbers
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                shapes = {name: [one.get_dtype(), *one.get_shape()] for name, one in slices.items()}
            header = {"notes": notes, "shapes": shapes}
        except UserError as error:
            header = {"error": str(error)}
    header = json.loads(here.spread_text(json.dumps(header)))
    if not header:
        return None
    if "error" in header:
        raise UserError(header["error"])
    if other := differences(header["notes"]["identity"], identity):
        raise UserError(
            f"{path}: the checkpoint is of another {whole_characters('; of another '.join(other))}. Give back what it "
            "was made with to continue it, or delete the file to begin anew"
        )
    _check_shapes(path, header["shapes"], parameters)
    # Where the count of steps lives is the optimizer's choice: beside the weights if it is fused, else on the CPU.
    beside = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for name, p in parameters.items():
        with torch.no_grad():
            p.copy_(receive(saved.get(f"weight/{name}"), p, here))
        prefix = f"optimizer/{name}/"
        for key in (key for key in header["shapes"] if key.startswith(prefix)):
            one = len(header["shapes"][key]) == 1  # its type, and no sizes
            like = torch.zeros((), device=p.device if beside else "cpu") if one else p.detach()
            optimizer.state[p][key.removeprefix(prefix)] = receive(saved.get(key), like, here)
    return header["notes"]


class DeferredSignals:
    """Holds SIGTERM and SIGINT back while weights and optimizer may disagree; they act when the block ends."""

    def __enter__(self) -> Self:
        self.arrived: int | None = None
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._put_back()
        if self.arrived and error is None:
            self.deliver()

    def deliver(self) -> None:
        """Let the signal do what it would have done; SIGTERM where it is another process that has one."""
        number, self.arrived = self.arrived or signal.SIGTERM, None
        self._put_back()
        signal.raise_signal(number)

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """A block in which signals act at once; one that waits acts first."""
        self.__exit__(None)
        try:
            yield
        finally:
            self.__enter__()

    def _put_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self.arrived = number


def _check_notes(path: Path, notes: Mapping[str, Any]) -> None:
    """Raise UserError where notes are not those that training keeps."""
    wrong = [name for name, kind in NOTES.items() if type(notes.get(name)) is not kind]
    counters = notes.get("counters")
    if not wrong and not all(type(value) in (int, float) and name in COUNTERS for name, value in counters.items()):
        wrong.append("counters")
    if not wrong and not all(isinstance(value, str) for value in notes["identity"].values()):
        wrong.append("identity")
    if wrong:
        raise UserError(
            f"{path}: not a checkpoint of training (in its notes, {' and '.join(wrong)} are missing or no such thing); "
            "delete it and run again"
        )


def _check_shapes(path: Path, shapes: Mapping[str, list], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise UserError where the tensors are not those of these parameters and of their optimizer."""
    here = {name: [DTYPES[p.dtype], *p.shape] for name, p in parameters.items()}
    mine = {f"weight/{name}": shape for name, shape in here.items()}
    for name, shape in here.items():
        prefix = f"optimizer/{name}/"
        if any(key.startswith(prefix) for key in shapes):  # a parameter that had no gradient so far has none
            mine |= {f"{prefix}step": ["F32"], f"{prefix}exp_avg": shape, f"{prefix}exp_avg_sq": shape}
    for name in {**mine, **shapes}:
        if shapes.get(name) != mine.get(name):
            raise UserError(
                f"{path}: the checkpoint is of another model ({name.removeprefix('weight/')} differs: "
                f"{shapes.get(name, 'absent')} there, {mine.get(name, 'absent')} here); delete it to begin anew"
            )
