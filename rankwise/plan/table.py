"""A plan as a person reads it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

MEMORY = (
    ("weights", "exact: float32, buffers included"),
    ("gradients", "exact: float32"),
    ("optimizer", "exact: AdamW's two moments"),
    ("activations", "traced: kept by the forward pass of the largest micro-batch"),
    ("temporary", "traced: beyond that at the peak, the head's vocabulary chunk above all"),
    ("communication", "estimated: DDP's buckets, or the blocks that FSDP2 puts together"),
)


def show(plan: dict[str, Any], console: Console | None = None) -> None:
    """Print a plan: memory, time, what to change, and what was measured."""
    console = console or Console()
    setup, forecast = plan["setup"], plan["forecast"]
    memory = forecast["memory"]
    console.print(
        f"{setup['model']}: {memory['parameters']:,} weights, {memory['trained']:,} of them trained; "
        f"{setup['precision']}, {setup['micro_batch_tokens']} positions a micro-batch, "
        f"{setup['processes']} process(es) on {setup['device']}"
    )
    console.print(_memory(plan, memory, forecast))
    console.print(_time(plan, forecast))
    console.print(_verdict(plan))
    if plan["measured"]:
        console.print(_measured(plan["measured"]))


def _memory(plan: dict[str, Any], memory: dict[str, int], forecast: dict[str, Any]) -> Table:
    table = Table("memory of one process", "GiB", "how it is known", title=None)
    table.columns[1].justify = "right"
    for name, how in MEMORY:
        table.add_row(name, _gib(memory[name]), how)
    table.add_row("peak", _gib(memory["peak"]), "when most of these are held at once")
    table.add_row("process", _gib(forecast["process_bytes"]), "libraries; on CUDA an assumption", end_section=True)
    table.add_row("total", _gib(forecast["total_bytes"]), "")
    table.add_row("device", _gib(plan["device_bytes"]), f"{plan['headroom']:.0%} of it to be left free")
    return table


def _time(plan: dict[str, Any], forecast: dict[str, Any]) -> Table:
    table = Table("an epoch", "", "how it is known")
    table.columns[1].justify = "right"
    table.add_row("positions", f"{forecast['positions']:,}", "exact: each prompt once")
    table.add_row("optimizer steps", f"{forecast['steps']:,}", "exact")
    table.add_row("model FLOPs", f"{forecast['flops']:.3e}", "exact: matrix products, nothing twice")
    table.add_row("FLOPs spent", f"{forecast['spent_flops']:.3e}", "with recomputation, without frozen weights")
    given = plan["setup"]["tflops"] is not None
    rate, share = plan["matmul_flops_per_second"], plan["efficiency"]
    table.add_row("matmul rate, TFLOP/s", f"{rate / 1e12:.3g}", "as given" if given else "measured just now")
    table.add_row("efficiency", f"{share:.2f}", "as given" if plan["setup"]["efficiency"] else "assumed; see --measure")
    table.add_row(
        "seconds a step", f"{forecast['seconds'] / forecast['steps']:.3g}", "estimated, communication left out"
    )
    table.add_row("seconds", f"{forecast['seconds']:.3g}", "estimated, communication left out")
    return table


def _verdict(plan: dict[str, Any]) -> str:
    if plan["fits"] and plan["largest_micro_batch_tokens"] >= plan["whole_step_positions"]:
        return f"It fits, and so would a whole step at once (micro_batch_tokens {plan['whole_step_positions']})."
    if plan["fits"]:
        return f"It fits. The largest micro_batch_tokens that does: {plan['largest_micro_batch_tokens']}."
    if not plan["remedies"]:
        return "It does not fit, and neither adapters nor 1024 processes make it fit: shorten the rows."
    changes = "; or ".join(f"{r['change']}, micro_batch_tokens {r['micro_batch_tokens']}" for r in plan["remedies"])
    return f"It does not fit. It would with {changes}."


def _measured(measured: dict[str, Any]) -> Table:
    table = Table(f"{measured['steps']} real steps", "predicted", "measured", "measured / predicted")
    for name, unit, show in (("bytes", "memory, GiB", _gib), ("seconds_per_step", "seconds a step", "{:.3g}".format)):
        predicted, seen = measured[f"predicted_{name}"], measured[f"measured_{name}"]
        table.add_row(unit, show(predicted), show(seen), f"{seen / predicted:.2f}")
    table.add_row("efficiency", "", f"{measured['measured_efficiency']:.2f}", "")
    return table


def _gib(count: int) -> str:
    return f"{count / 2**30:.3f}"
