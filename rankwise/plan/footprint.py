"""Memory of a training step before there is one: the step itself runs on tensors without storage, and is watched.

Weights, gradients and AdamW's two moments follow from the shapes and are exact. Activations and temporaries follow
from the very code that will run: LogpModel goes forward and backward over a real micro-batch under torch's
FakeTensorMode, where every operator gives its result's shape and nothing else, and each result is counted from its
birth to the moment that nothing holds it. What operators take inside for themselves, what an allocator loses between
blocks, and a GPU back-end that differs from the CPU's are not seen. Shards and buckets of several processes are
estimated from how the wrappers work.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rankwise.checkpoints import Precision, numerics, without_dropout
from rankwise.rendering import TokenRow
from rankwise.scoring import LogpModel

Sharding = Literal["ddp", "fsdp"]
GATHERED_BLOCKS = 2  # FSDP2 holds the block at work and gathers the next one meanwhile


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides the memory of a step, its micro-batch apart."""

    config: PreTrainedConfig
    precision: Precision = "fp32"
    lora_rank: int = 0  # adapters on every linear layer of the body; 0 trains all weights
    gradient_checkpointing: bool = False
    processes: int = 1
    sharding: Sharding = "ddp"  # of several processes: each holds all, or its share
    device: Literal["cpu", "cuda"] = "cpu"  # rows lie otherwise on each


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one process. peak is when most is held at once; the parts need not all be held then."""

    parameters: int  # number of weights of the whole model, adapters included
    trained: int  # number of those that are trained
    weights: int  # exact: float32, buffers included
    gradients: int  # exact: float32
    optimizer: int  # exact: two moments, and a step count a tensor
    activations: int  # traced: what the forward pass keeps for the backward pass
    temporary: int  # traced: what the peak holds beyond that, the head's vocabulary chunk above all
    communication: int  # estimated: DDP's buckets, or the blocks that FSDP gathers
    peak: int


def footprint(shape: Shape, part: list[TokenRow], *, accumulates: bool = True) -> Footprint:
    """Memory of an optimizer step whose largest micro-batch is part.

    Args:
        accumulates: the step has several micro-batches, so gradients are there while activations are made. A step of
            one micro-batch makes its gradients as the activations go, which peaks lower.

    Raises UserError where the rows have no prompt token.
    """
    shares = shape.processes if shape.sharding == "fsdp" else 1
    with torch.device("meta"):
        model = fresh_model(shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(t.nbytes for t in _distinct([*model.parameters(), *model.buffers()]))
    gradients = sum(p.nbytes for p in trained)
    gathered = _shard(model, shape.precision) if shares > 1 else 0
    released = accumulates or shares > 1
    kept, peak = _trace(model, part, shape, released=released)
    optimizer = 2 * gradients + 4 * len(trained)
    buckets = gradients if shape.processes > 1 and shape.sharding == "ddp" else 0
    states = weights + optimizer + (gradients if released else 0)
    return Footprint(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in trained),
        weights=-(-weights // shares),
        gradients=-(-gradients // shares),
        optimizer=-(-optimizer // shares),
        activations=kept,
        temporary=max(0, peak - kept - (0 if released else gradients)),
        communication=gathered + buckets,
        # The optimizer's own step comes after the activations, and AdamW is fused: it holds nothing besides.
        peak=max(-(-states // shares) + peak, -(-(weights + optimizer + gradients) // shares)) + gathered + buckets,
    )


def fresh_model(shape: Shape) -> nn.Module:
    """The model that training would hold, with random weights, in float32; adapters where shape asks for them."""
    config = copy.deepcopy(shape.config)  # a model writes its choice of attention into it
    model = without_dropout(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    if shape.lora_rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=shape.lora_rank, target_modules="all-linear"))
    return model


def _trace(model: nn.Module, part: list[TokenRow], shape: Shape, *, released: bool) -> tuple[int, int]:
    """Bytes beyond the model's own: at the end of the forward pass, and at the peak of both passes."""
    model.train()
    if shape.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        plain = model.get_base_model() if shape.lora_rank else model
        plain.tie_weights()  # which to_empty has cut
        for p in model.parameters():
            if released and p.requires_grad:  # added to what is there, or sent to its shard, as soon as it is whole
                p.register_post_accumulate_grad_hook(_release)
        # As LogpModel chooses, on the understanding that the model can take it; a real run asks the model itself.
        flat = shape.device == "cpu" and plain.config._attn_implementation == "sdpa"
        return _passes(model, part, shape.precision, "flat" if flat else "shared")


def _passes(model: nn.Module, part: list[TokenRow], precision: Precision, layout: str) -> tuple[int, int]:
    module = LogpModel(model, layout=layout)
    with unset_fake_temporarily():  # rows are laid out by looking at numbers
        batch = module.batch(part, 0)
    with _LiveBytes(module) as live, numerics(precision, torch.device("cpu")):
        total = module(batch).sum_A.sum()
        kept = live.now
        total.backward()
    return kept, live.peak


def _release(p: Tensor) -> None:
    p.grad = None


def _shard(model: nn.Module, precision: Precision) -> int:
    """Blocks in the type in which FSDP2 puts them together (rankwise.parallel); bytes of whole weights held at once.

    Those are what lies outside the blocks, and the blocks at work.
    """
    names = {name for m in model.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    blocks = [m for m in model.modules() if type(m).__name__ in names]
    outside = _bytes(model) - sum(map(_bytes, blocks))
    if precision == "bf16":
        for block in blocks:
            block.to(torch.bfloat16)
    return outside + sum(sorted(map(_bytes, blocks))[-GATHERED_BLOCKS:])


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors that share a storage once: tied weights, buffers under two names."""
    return list({id(t.untyped_storage()): t for t in tensors}.values())


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operator makes, until it is freed; those of a model are none of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()  # a storage is known by several tensors: views, in-place results
        self._known.update((t.untyped_storage(), 0) for t in (*model.parameters(), *model.buffers()))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, out)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size
