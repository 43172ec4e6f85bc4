"""Long and large: peak memory and time a row of the stages, as their tables grow; and a million records in.

    python -m benchmarks.soak
    python -m benchmarks.soak --factors 1 5 --records 100000 --stages prompts doctor
    python -m benchmarks.soak --factors 50 --records 0 --json a.json        # in parts, and all of them together:
    python -m benchmarks.soak --factors 0 --records 0 --add a.json b.json --figure docs/figures/soak.png

In copies of this checkout each stage of the default pipeline runs on 1, 5, 20 and 50 times the default's rows (the last
are 100,000 prompts with 4 answers each), then stage prompts on a million records of a JSONL file, of a Parquet file,
and on a million prompts of the embedded corpus. Models have a few weights, answers a few tokens, and the judge counts
letters: measured is how tables are read, joined, kept and written; a model's own work grows with its rows anyway.
MLflow is off.

Every stage is a process of its own. Its peak is that of its resident memory, by the kernel's account, and is held to
--limit; the kernel refuses what is far beyond it (RLIMIT_DATA), and the stage fails. Time is CPU time, which other work
disturbs least. Start and imports are not a row's: a row's cost is that of the rows by which a run is larger than the
one before it.
Exit status 1 where memory passes the limit or grows with the table, or a row costs more where there are many.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import cli, report
from benchmarks.arguments import place
from benchmarks.report import Figure
from benchmarks.scratch import GATES, Copy, scratch_copy
from benchmarks.soak_records import SOURCES, write_records
from rankwise.types import UserError

FACTORS = (1, 5, 20, 50)  # of the default's rows
RECORDS = 1_000_000
PARTS = (10, 2, 1)  # a run with a tenth of them, with half, with all: at a tenth no sorting on disk has begun
SIZES = {"sft": 6000, "rollout": 2000, "eval": 300, "labelled": 2000, "labelled_test": 300}  # the default's rows
LIMIT_MIB = 1536  # of a stage's memory, whatever its rows
RESERVED_MIB = 1536  # that torch and BLAS ask the kernel for beyond what they ever touch
GROWTH_BYTES = 512  # of peak memory a row, at most, between the two largest sizes; held, a row takes 2,700 to 12,000
SLOWER = 1.5  # times what a row of a table of the smaller sizes costs, at most

PROMPTS = "data/prompts"
TABLES = [f"{PROMPTS}/{name}.parquet" for name in (*SIZES, "preferences")]
STAGES = {  # in the pipeline's order: what a stage's rows are counted in
    "prompts": TABLES,
    "base_model": [f"{PROMPTS}/sft.parquet"],
    "doctor": TABLES,
    "sft": [f"{PROMPTS}/sft.parquet"],
    "rollouts": ["data/rollouts.parquet"],
    "verdicts": ["data/rollouts.parquet"],
    "audit_judge": ["data/rollouts.parquet"],
    "preferences": ["data/rollouts.parquet"],
    "reference_logprobs": ["data/preferences.parquet"],
    "dpo": ["data/preferences.parquet"],
}
# Stages that hold what they look at again, tokens or verdicts: reported, and held to no bound but the limit.
HOLDING = ("sft", "audit_judge", "dpo")


def main(arguments: list[str]) -> None:
    options = _options(arguments)
    runs = [run for file in options.add for run in json.loads(Path(file).read_text(encoding="utf-8"))["runs"]]
    with tempfile.TemporaryDirectory(dir=options.where) as folder:
        where = Path(folder)
        for factor in filter(None, options.factors):
            report.say(f"{factor} × the default's rows")
            runs += _pipeline(factor, options, where)
        for source in options.sources if options.records else ():
            for records in sorted({max(1, options.records // part) for part in PARTS}):
                report.say(f"{records:,} records, {source}")
                runs.append(_prompts(source, records, options, where))
    lines = _lines([one for one in runs if "died" not in one])
    figures = _figures(lines, options) | _deaths(runs)
    record = {
        "benchmark": "soak",
        "options": cli.told(options),
        "machine": _machine(),
        "results": [],
        "runs": runs,
        "lines": lines,
        "figures": {name: {**vars(one), "met": one.met} for name, one in figures.items()},
    }
    _show(record, lines, figures, options.json)
    if options.figure:
        from benchmarks.soak_figure import draw

        draw(lines, Path(options.figure), limit_mib=options.limit)
    if missed := [name for name, one in figures.items() if not one.met]:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
        sys.exit(1)


# Runs


def _recipe(prompts: dict[str, Any], k: int = 4) -> dict[str, Any]:
    """The default with other tables, and with models and a judge that cost next to nothing."""
    judge = {"kind": "callable", "function": "recipes.judges:brevity"}
    return {
        "prompts": prompts,
        "base_model": {"embedded": {"vocabulary": 600, "hidden": 16, "layers": 1, "heads": 2, "context": 256}},
        "doctor": {"stop_above": {"duplicate_prompts": 1.0}},
        "sft": {"epochs": 1, "held_out": 16, "batch_size": 256},
        "reward_model": {"enabled": False},
        "rollouts": {
            "k": k,
            "max_new_tokens": 6,
            "max_cut_share": 1.0,
            "max_empty_share": 1.0,
            "max_duplicate_share": 1.0,
        },
        "verdicts": {"judge": judge},
        "audit_judge": {"probes": 2, "labelled": 4, "gates": dict.fromkeys(GATES)},
        "preferences": {"max_tied_share": 1.0},
        "dpo": {"batch_size": 256},
        "evaluate": {"judge": judge},
    }


def _pipeline(factor: int, options: argparse.Namespace, where: Path) -> list[dict[str, Any]]:
    """Every stage up to the last that is asked for, on so many times the default's rows."""
    sizes = {name: size * factor for name, size in options.sizes.items()}
    last = max(list(STAGES).index(stage) for stage in options.stages)
    found = []
    with scratch_copy(_recipe({"opening_words": 12, "embedded": sizes}, k=options.k), where=where) as copy:
        _add_judge(copy)
        for stage in list(STAGES)[: last + 1]:
            found.append(_run(copy, stage, stage, STAGES[stage], options, factor=factor))
            if "died" in found[-1]:
                break
    return [one for one in found if one["what"] in options.stages or "died" in one]


def _prompts(source: str, records: int, options: argparse.Namespace, where: Path) -> dict[str, Any]:
    """Stage prompts alone on a file of so many records, or on as many prompts of the corpus."""
    if source == "corpus":
        rest = dict.fromkeys(SIZES, 1) | {"eval": 300}
        prompts: dict[str, Any] = {"opening_words": 16, "embedded": rest | {"rollout": records}}
    else:
        prompts = {"source": "files", "files": {"rollout": {"path": f"records.{source}"}}}
    with scratch_copy(_recipe(prompts), where=where) as copy:
        if source != "corpus":
            write_records(copy.root / f"data/source/records.{source}", records)
        return _run(copy, "prompts", f"prompts: {source}", TABLES, options)


def _add_judge(copy: Copy) -> None:
    path = copy.root / "recipes/judges.py"
    path.write_text(path.read_text(encoding="utf-8") + "\n\ndef brevity(prompt, answer):\n    return -len(answer)\n")


def _run(
    copy: Copy, stage: str, what: str, tables: Sequence[str], options: argparse.Namespace, factor: int | None = None
) -> dict[str, Any]:
    """One stage to its end within the limit, and its rows."""
    import pyarrow.parquet as pq

    limited = ("prlimit", f"--data={(options.limit + RESERVED_MIB) * 2**20}") if options.limit else ()
    try:
        cost = copy.run(*limited, "python", "-m", f"tasks.{stage}", RANKWISE_TRACKING="off")
    except AssertionError as error:
        report.say(f"  {what}: {error}")
        return {"what": what, "factor": factor, "died": str(error).splitlines()[-1]}
    rows = sum(pq.read_metadata(copy.root / table).num_rows for table in tables)
    report.say(f"  {what}: {rows:,} rows, {cost.peak_bytes / 2**20:,.0f} MiB, {cost.cpu_s:,.1f} CPU s")
    return {"what": what, "factor": factor, "rows": rows, **vars(cost)}


# What was found


def _lines(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs, by stage and size, with what a row more costs, in CPU time and in peak memory."""
    found = []
    for what in dict.fromkeys(one["what"] for one in runs):
        before = None
        for one in sorted((one for one in runs if one["what"] == what), key=lambda one: one["rows"]):
            more = one["rows"] - before["rows"] if before else 0
            added = {"cpu_us_a_row": None, "bytes_a_row": None}
            if more:
                added["cpu_us_a_row"] = 1e6 * (one["cpu_s"] - before["cpu_s"]) / more
                added["bytes_a_row"] = (one["peak_bytes"] - before["peak_bytes"]) / more
            found.append({**one, **added, "rows_per_second": one["rows"] / one["wall_s"]})
            before = one
    return found


def _figures(lines: Sequence[dict[str, Any]], options: argparse.Namespace) -> dict[str, Figure]:
    highest = max(lines, key=lambda one: one["peak_bytes"])
    figures = {
        f"peak memory of any stage ({highest['what']})": Figure(
            value=round(highest["peak_bytes"] / 2**20), limit=options.limit or None, sign="≤", unit=" MiB"
        )
    }
    for what in dict.fromkeys(one["what"] for one in lines):
        mine = [one for one in lines if one["what"] == what]
        held = what not in HOLDING and not options.quick
        if len(mine) > 1:
            figures[f"{what}: memory a row more"] = Figure(
                value=round(max(0.0, mine[-1]["bytes_a_row"]), 1),
                limit=GROWTH_BYTES if held else None,
                sign="≤",
                unit=" bytes",
            )
        if len(mine) > 2:
            slower = mine[-1]["cpu_us_a_row"] / mine[1]["cpu_us_a_row"]
            limit = None if options.quick else SLOWER
            figures[f"{what}: time a row more, largest to smallest"] = Figure(
                value=round(slower, 2), limit=limit, sign="≤", unit=" ×"
            )
    return figures


def _deaths(runs: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Stages that did not come to their end, as figures that miss."""
    died = [one for one in runs if "died" in one]
    return {
        f"{one['what']} ({one['factor']} ×) ended: {one['died'][:80]}": Figure(value=1, limit=0, sign="=")
        for one in died
    }


def _show(record: dict[str, Any], lines: list[dict[str, Any]], figures: dict[str, Figure], to: str | None) -> None:
    number = lambda value, form=",.0f": "" if value is None else format(value, form)
    columns = ("stage", "rows", "peak MiB", "bytes a row more", "CPU µs a row more", "CPU s", "wall s", "rows/s")
    table = [
        [
            one["what"],
            number(one["rows"]),
            number(one["peak_bytes"] / 2**20),
            number(one["bytes_a_row"]),
            number(one["cpu_us_a_row"]),
            number(one["cpu_s"], ",.1f"),
            number(one["wall_s"], ",.1f"),
            number(one["rows_per_second"]),
        ]
        for one in lines
    ]
    report.table("stages as their tables grow", columns, table, to)
    bounds = [one.line(name) for name, one in figures.items()]
    report.emit(record, "bounds", ("figure", "found", "limit", "met"), bounds, to)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--factors", type=int, nargs="+", metavar="N", help=f"times the default's rows; 0: none ({_several(FACTORS)})")
    add("--sizes", type=_size, nargs="+", default=[], metavar="TABLE=ROWS", help="other rows than the default's")
    add("--k", type=int, default=4, metavar="N", help="answers a prompt (%(default)s)")
    add("--stages", nargs="+", default=list(STAGES), metavar="STAGE", help=f"({_several(STAGES)})")
    add("--records", type=int, metavar="N", help=f"records for stage prompts alone; 0: none ({RECORDS:,})")
    add("--sources", nargs="+", choices=SOURCES, default=SOURCES, help=f"of these ({_several(SOURCES)})")
    add("--add", nargs="+", default=[], metavar="FILE", help="records whose runs are told too: a soak in several parts")
    add("--limit", type=int, default=LIMIT_MIB, metavar="MIB", help="memory of a stage; 0: no limit (%(default)s)")
    add("--figure", type=place, metavar="FILE", help="draw the figure, PNG")
    add("--where", metavar="FOLDER", help="for the copies, up to 2 GB (a temporary folder)")
    add("--quick", action="store_true", help="a few rows, no bounds but the limit: to see that it runs")
    add("--json", nargs="?", const="-", type=place, metavar="FILE", help="the record as JSON")
    options = parser.parse_args(arguments)
    sizes = {name: max(12, size // 100) for name, size in SIZES.items()} if options.quick else SIZES
    options.sizes = {**sizes, **dict(options.sizes)}
    options.factors = sorted(set(options.factors or ((1, 2) if options.quick else FACTORS)))
    if options.records is None:
        options.records = 2000 if options.quick else RECORDS
    if options.records < 0 or options.limit < 0 or options.factors[0] < 0:
        raise UserError("--factors, --records and --limit are 0 or more")
    if unknown := [stage for stage in options.stages if stage not in STAGES]:
        raise UserError(f"--stages {unknown[0]}: no such stage here; there are {_several(STAGES)}")
    if options.limit and not shutil.which("prlimit"):
        raise UserError("--limit: prlimit (of util-linux) is not on PATH; install it, or give --limit 0")
    if options.where is not None and not Path(options.where).is_dir():
        raise UserError(f"--where {options.where}: no such folder; make it first")
    return options


def _size(text: str) -> tuple[str, int]:
    name, _, rows = text.partition("=")
    if name not in SIZES or not rows.isdigit() or not int(rows):
        raise argparse.ArgumentTypeError(f"{text!r} is not a table ({_several(SIZES)}) and its rows, as sft=300")
    return name, int(rows)


def _several(values: Any) -> str:
    return " ".join(map(str, values))


def _machine() -> dict[str, Any]:
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in ("pyarrow", "torch")}}
    load = f"cpu (load {os.getloadavg()[1]:.1f} over 5 minutes)"
    return {"device": load, "cores": os.cpu_count(), "threads": 1, "versions": versions}


if __name__ == "__main__":
    cli.command(main)
