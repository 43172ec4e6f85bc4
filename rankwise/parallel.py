"""Several processes of one launch: who is who, how numbers are added up, and how a model lies among them.

torchrun starts the processes (accelerate launch too, with the files of infra/accelerate); torch.distributed joins them.
A model is kept whole by every process and its gradients are averaged (DDP), or every process keeps a part of each
weight and layers are put together only while they compute (FSDP2, torch's fully_shard). ACCELERATE_USE_FSDP=true asks
for the second, as accelerate's own files do; its FSDP plugin is not used: on a CPU it shards nothing and says nothing.

Small numbers and the wish to stop travel between CPUs (gloo), so that asking for them waits for no GPU.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from rankwise.checkpoints import Precision, device
from rankwise.types import UserError

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # gloo's own limit, 30 minutes, is less than two processes' shares may differ by
POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of its launch; alone, every method is a no-op."""

    rank: int  # 0 first; the first process writes and speaks
    count: int
    device: torch.device
    sharded: bool  # whether weights are cut among the processes

    @property
    def first(self) -> bool:
        return self.rank == 0

    def deal(self, parts: Sequence[list[T]]) -> list[tuple[list[T], float]]:
        """This process's micro-batches with their weight, alike in number; a short hand repeats a row at weight 0."""
        mine = [(part, 1.0) for part in parts[self.rank :: self.count]]
        rounds = -(-len(parts) // self.count)
        return mine + [(parts[0][:1], 0.0)] * (rounds - len(mine))

    def total(self, values: Tensor) -> Tensor:
        """The sum of a CPU tensor over all processes."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def agree(self, wish: bool) -> bool:
        """Whether any process wishes it; all get the same answer."""
        return wish if self.count == 1 else bool(self.total(torch.tensor([float(wish)])).item())

    def gather(self, values: Tensor) -> list[Tensor]:
        """A CPU tensor of one shape from every process, in their order."""
        if self.count == 1:
            return [values]
        found = [torch.empty_like(values) for _ in range(self.count)]
        dist.all_gather(found, values)
        return found

    def spread(self, values: Tensor) -> Tensor:
        """The first process's tensor, in place of each other one's of the same shape."""
        if self.count > 1:
            dist.broadcast(values, src=0)
        return values

    def meet(self) -> None:
        """Wait for the others, hours if they need them; a signal is heard meanwhile, and so is a process that died.

        The first meeting of a launch joins a group of its own, so all have to come to it within minutes.
        """
        if self.count == 1:
            return
        waiting = dist.barrier(group=_patient(), async_op=True)
        while not waiting.is_completed():
            time.sleep(POLL_S)
        waiting.wait()

    def to_first(self, value: Any) -> list[Any]:
        """A JSON-able value of every process, in their order; the others than the first get none."""
        if self.count == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(size) for size in self.gather(torch.tensor([len(data)]))]
        padded = nn.functional.pad(data, (0, max(sizes) - len(data)))
        found = [torch.empty_like(padded) for _ in sizes] if self.first else None
        dist.gather(padded, found)
        return [json.loads(part[:size].numpy().tobytes()) for part, size in zip(found or (), sizes)]

    def spread_text(self, text: str) -> str:
        """The first process's text, to all."""
        if self.count == 1:
            return text
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        size = int(self.spread(torch.tensor([len(data)])).item())
        data = data if self.first else torch.empty(size, dtype=torch.uint8)
        return self.spread(data).numpy().tobytes().decode()


def processes(environment: Mapping[str, str] = os.environ) -> Processes:
    """Join the launch that this process belongs to, as its environment describes it.

    Raises:
        UserError: a launch was asked for several processes and started one; it has more processes than GPUs; it asks
            for a way of sharding that is not there.
    """
    count = int(environment.get("WORLD_SIZE", "1"))
    sharded = environment.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
    _check_launch(environment, count, sharded)
    where = device()
    if count > 1 and not dist.is_initialized():
        if where.type == "cuda":
            torch.cuda.set_device(where)
        dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
    return Processes(rank=int(environment.get("RANK", "0")), count=count, device=where, sharded=sharded)


@functools.cache
def _patient() -> dist.ProcessGroup:
    """The processes once more, in a group whose collectives may take as long as a share of the work does."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def place(module: nn.Module, precision: Precision) -> nn.Module:
    """Move a model to this process's device, whole, or cut in place where the launch shards.

    Called again, after the model was looked at, it leaves the model as the first call did.
    """
    here = processes()
    if not here.sharded:
        return module.to(here.device)
    if isinstance(module, FSDPModule):
        _put_away(module)
        return module
    mesh = init_device_mesh(here.device.type, (here.count,))
    # Under autocast a cast copy of every weight would outlive its layer and undo the sharding, so layers are put
    # together in bf16. What they pass on stays as autocast has it; embedding and head, in the root, stay float32.
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = bf16 if precision == "bf16" else MixedPrecisionPolicy()
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true"
    names = {name for m in module.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    for layer in [m for m in module.modules() if type(m).__name__ in names]:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=again)
    fully_shard(module, mesh=mesh)
    # Buffers are not cut: rotary tables and the like.
    return module.to(here.device)


def synchronised(module: nn.Module, *, idle: bool) -> nn.Module:
    """What runs forward so that backward averages gradients over all processes; the placed module itself if alone.

    Args:
        idle: whether some weight may get no gradient; DDP then looks which, where it would wait for it in vain.
    """
    if dist.is_initialized() and not isinstance(module, FSDPModule):
        # Buffers are alike in all processes and stay so.
        return DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=idle)
    return module


def accumulating(wrapped: nn.Module) -> contextlib.AbstractContextManager:
    """A block whose gradients stay with their process until a later backward.

    Sharded gradients are averaged each time all the same: kept whole, they would need what sharding saves.
    """
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext()


def plain(value: Tensor) -> Tensor:
    """A tensor as a whole; of a sharded one all processes must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def receive(whole: Tensor | None, like: Tensor, here: Processes) -> Tensor:
    """The first process's tensor, cut or copied as `like` is; the other processes give None."""
    local = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if whole is not None:
        local.copy_(whole)
    if isinstance(like, DTensor):
        return distribute_tensor(local, like.device_mesh, like.placements)
    return here.spread(local)


@torch.no_grad()
def gather_weights(module: nn.Module) -> None:
    """After training: a sharded model's weights as plain tensors on the first process's CPU, one after another.

    The other processes take part and keep their own parts; nobody can run the model afterwards.
    """
    if not isinstance(module, FSDPModule):
        return
    _put_away(module)
    whole: dict[nn.Parameter, nn.Parameter] = {}  # a tied weight is one parameter in two places
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            if p not in whole:
                tensor = plain(p.detach())
                whole[p] = nn.Parameter(tensor.cpu(), requires_grad=p.requires_grad) if processes().first else p
            setattr(part, name, whole[p])


def _put_away(module: nn.Module) -> None:
    """Cut again what a forward pass without gradients left whole: an optimizer must see the parts."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _check_launch(environment: Mapping[str, str], count: int, sharded: bool) -> None:
    remedy = "start it as torchrun --nproc-per-node N -m tasks.NAME (Several processes, in docs/operate.md)"
    # accelerate launch names a port for the processes that it was asked for; a worker of a real launch has a rank too.
    if count == 1 and "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment:
        raise UserError(
            "accelerate launch was asked for several processes and started one, as it does with --cpu, and without "
            f"GPUs where no file says distributed_type; {remedy}"
        )
    if sharded and count == 1:
        raise UserError(f"ACCELERATE_USE_FSDP asks for weights cut among processes, and this launch has one; {remedy}")
    if sharded and environment.get("FSDP_VERSION", "2") != "2":
        raise UserError(f"FSDP_VERSION is {environment['FSDP_VERSION']}; FSDP2 is the one that is here: say 2")
    if sharded and environment.get("FSDP_OFFLOAD_PARAMS", "false") == "true":
        raise UserError("FSDP_OFFLOAD_PARAMS is true, and weights cannot be kept on the CPU here; say false")
    gpus, place_here = torch.cuda.device_count(), int(environment.get("LOCAL_RANK", "0"))
    if gpus and place_here >= gpus:
        raise UserError(
            f"this machine has {gpus} GPU(s), and the launch asks it for at least {place_here + 1} processes, one GPU "
            "each; lower --nproc-per-node, or set CUDA_VISIBLE_DEVICES= (empty) to compute on the CPU"
        )
