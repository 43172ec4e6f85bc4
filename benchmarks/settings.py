"""How each side may be set, and how a setting is written on the command line.

Ours: precision-budget (bf16-4096: bf16 autocast, 4,096 positions a forward pass). TRL's: precision-mode-micro
(medium-compile-8: matmul precision "medium", torch.compile, 8 pairs a forward pass), for SFT also -packed. An engine's
for rollouts: precision-batch (bf16-128: 128 answers decoded together), for generate() precision-cache-batch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.workload import Case
from rankwise.types import UserError

PRECISIONS = ("fp32", "medium", "bf16")  # as rankwise.checkpoints.Precision
MODES = ("eager", "compile")
CACHES = ("dynamic", "static")
ENGINES = ("embedded", "generate", "continuous", "server")


@dataclass(frozen=True, kw_only=True)
class OurSetting:
    """What a user of rankwise may choose."""

    precision: str
    budget: int  # positions a forward pass

    def __str__(self) -> str:
        return f"{self.precision}-{self.budget}"

    def spec(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TrlSetting:
    """What a user of TRL may choose, as far as it makes a step faster."""

    precision: str
    mode: str  # compile also pads to a multiple of 64, so that few shapes are compiled
    micro: int  # pairs (SFT: examples, or packed rows) a forward pass; the rest is gradient accumulation
    packed: bool = False  # SFT only: examples packed best-fit into rows of the context's length

    def __str__(self) -> str:
        return f"{self.precision}-{self.mode}-{self.micro}{'-packed' if self.packed else ''}"

    def spec(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class EngineSetting:
    """What a user of an engine may choose, as far as it makes rollouts faster."""

    precision: str  # "own": a server's command says it
    batch: int  # answers decoded together
    cache: str = ""  # generate() alone: dynamic | static, which is compiled too

    def __str__(self) -> str:
        return "-".join(filter(None, (self.precision, self.cache, str(self.batch))))

    def spec(self) -> dict[str, Any]:
        return asdict(self)


def our_setting(text: str) -> OurSetting:
    """Read "bf16-4096"; raises UserError."""
    precision, _, budget = text.partition("-")
    if precision not in PRECISIONS or not budget.isdigit() or int(budget) < 1:
        raise UserError(f"{text!r} is no setting; write PRECISION-POSITIONS, as in bf16-4096 ({_names()})")
    return OurSetting(precision=precision, budget=int(budget))


def trl_setting(text: str) -> TrlSetting:
    """Read "medium-compile-8" or "bf16-eager-1-packed"; raises UserError."""
    parts = text.removesuffix("-packed").split("-")
    named = len(parts) == 3 and parts[0] in PRECISIONS and parts[1] in MODES
    if not named or not parts[2].isdigit() or int(parts[2]) < 1:
        raise UserError(
            f"{text!r} is no setting; write PRECISION-MODE-MICRO, as in medium-compile-8 "
            f"({_names()}; modes {', '.join(MODES)}; -packed at the end for SFT)"
        )
    return TrlSetting(precision=parts[0], mode=parts[1], micro=int(parts[2]), packed=text.endswith("-packed"))


def engine_setting(engine: str, text: str) -> EngineSetting:
    """Read "bf16-128", or of generate() "bf16-dynamic-32"; raises UserError."""
    *parts, batch = text.split("-")
    precisions, caches = (("own",), ()) if engine == "server" else (("fp32", "bf16"), CACHES)
    wanted = 2 if engine == "generate" else 1
    named = len(parts) == wanted and parts[0] in precisions and (wanted == 1 or parts[1] in caches)
    if not named or not batch.isdigit() or int(batch) < 1:
        example = {"generate": "bf16-dynamic-32", "server": "own-256"}.get(engine, "bf16-128")
        raise UserError(f"{text!r} is no setting of {engine}; write it as in {example}")
    return EngineSetting(precision=parts[0], cache=parts[1] if wanted == 2 else "", batch=int(batch))


def engine_candidates(engine: str, case: Case) -> tuple[list[EngineSetting], list[int]]:
    """Settings of an engine to try first, and the batches to try at the best of them."""
    if engine == "server":
        return [EngineSetting(precision="own", batch=256)], []
    gpu = case.device == "cuda"
    caches = CACHES if engine == "generate" else ("",)
    middle, others = (256, [64, 1024]) if gpu else (32, [8, 128]) if engine == "generate" else (128, [64, 256])
    precisions = ("bf16",) if gpu else ("fp32", "bf16")
    return [EngineSetting(precision=p, cache=cache, batch=middle) for p in precisions for cache in caches], others


def our_candidates(case: Case) -> tuple[list[OurSetting], list[int]]:
    """Settings to try first, and the budgets to try at the best of them."""
    if case.device == "cuda":
        return [OurSetting(precision="bf16", budget=16_384)], [8192, 32_768, 65_536]
    return [OurSetting(precision=precision, budget=4096) for precision in PRECISIONS], [2048, 8192]


def trl_candidates(case: Case, examples: int) -> tuple[list[TrlSetting], list[int]]:
    """Settings to try first, and the micro-batches to try at the best of them."""
    precisions = ("bf16",) if case.device == "cuda" else ("medium", "bf16")
    start = dividing(examples, 8 if case.device == "cuda" else 4)
    first = [TrlSetting(precision=p, mode=mode, micro=start) for p in precisions for mode in MODES]
    if case.task == "sft":
        first += [replace(setting, micro=1, packed=True) for setting in first]
    sizes = {dividing(examples, size) for size in ((2, 4, 16, 32) if case.device == "cuda" else (2, 8, 16))}
    return first, sorted(sizes - {start})


def dividing(examples: int, size: int) -> int:
    """The largest micro-batch up to size that divides the step, since TRL averages over unequal ones unweighted."""
    return next(micro for micro in range(max(1, min(size, examples)), 0, -1) if examples % micro == 0)


def _names() -> str:
    return f"precisions {', '.join(PRECISIONS)}"
