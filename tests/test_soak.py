"""Laws of large tables: memory does not grow with them, order and parts change no byte; and of the benchmark that shows
it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import soak, soak_figure, soak_records
from rankwise import sorted_tables
from rankwise.rows import RowTable, read_rows, rows_writer, write_rows
from rankwise.seen import Distinct, Seen
from rankwise.types import Answer, Row, UserError, text_prompt
from tasks import recipe

ROOT = Path(__file__).parent.parent


def row(number: int, words: int = 20) -> Row:
    answers = tuple(
        Answer(text=f" answer {k} of {number}" * words, token_ids=tuple(range(k, k + words)), logps=(-0.5,) * words)
        for k in range(2)
    )
    return Row(id=f"row-{number:07d}", prompt=text_prompt(f"prompt {number}"), answers=answers, meta={"n": number})


# Tables


@pytest.fixture
def small(monkeypatch):
    """Groups, blocks and runs so small that a few rows are many of each."""
    monkeypatch.setattr(sorted_tables, "GROUP_ROWS", 64)
    monkeypatch.setattr(sorted_tables, "BLOCK_ROWS", 16)
    monkeypatch.setattr(sorted_tables, "RUN_BYTES", 20_000)


@pytest.mark.parametrize("seed", range(3))
def test_rows_in_any_order_are_the_same_bytes_however_many_runs_they_take(small, tmp_path, seed):
    rows = [row(n, words=n % 7) for n in range(500)]
    write_rows(tmp_path / "ordered.parquet", rows)
    mixed = random.Random(seed).sample(rows, len(rows)) if seed else [*rows[:300], *reversed(rows[300:])]
    write_rows(tmp_path / "mixed.parquet", mixed)
    assert (tmp_path / "mixed.parquet").read_bytes() == (tmp_path / "ordered.parquet").read_bytes()
    assert read_rows(tmp_path / "mixed.parquet") == rows
    assert pq.read_metadata(tmp_path / "mixed.parquet").num_row_groups == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed.parquet", "ordered.parquet"]


def test_a_group_of_long_rows_ends_early(small, tmp_path, monkeypatch):
    monkeypatch.setattr(sorted_tables, "GROUP_BYTES", 100_000)
    write_rows(tmp_path / "t.parquet", [row(n, words=200) for n in range(100)])
    assert pq.read_metadata(tmp_path / "t.parquet").num_row_groups == 7  # a block of 16 rows has more than that each


def test_an_id_that_occurs_twice_in_different_runs_is_refused(small, tmp_path):
    rows = [row(n) for n in range(300)]
    mixed = random.Random(0).sample(rows, len(rows))
    with pytest.raises(UserError, match=f"'{mixed[0].id}' occurs twice"):
        write_rows(tmp_path / "t.parquet", [*mixed, mixed[0]])
    assert not list(tmp_path.iterdir())


def test_rows_of_one_key_keep_their_order_through_runs(small, tmp_path):
    """As verdicts do: the judges of a row come in the order of the panel."""
    from rankwise.rows import table_writer
    from rankwise.verdicts import SCHEMA, Question, Reply, joined, verdict_of

    told = []
    with table_writer(tmp_path / "t.parquet", SCHEMA, key="row_id") as table:
        for judge in ("b", "a"):
            for n in range(200):
                question = Question(row_id=f"r{n:03d}", prompt=text_prompt("p"), answers=("x",), places=(0,))
                told.append(verdict_of(judge, "", Reply(question=question, values=(float(n),))))
                columns = [pa.array([getattr(told[-1], field.name)], field.type) for field in SCHEMA]
                table.add(pa.Table.from_arrays(columns, schema=SCHEMA))
    rows = [Row(id=f"r{n:03d}", prompt=text_prompt("p"), answers=(Answer(text="x"),)) for n in range(200)]
    found = list(joined(tmp_path / "t.parquet", rows))
    assert [one.id for one, _ in found] == [one.id for one in rows]
    assert all([v.judge for v in mine] == ["b", "a"] and mine[0].values == (n,) for n, (_, mine) in enumerate(found))
    for others in (rows[1:], rows[:-1], [rows[0], *rows[2:]]):
        with pytest.raises(UserError, match="no row has this id"):
            list(joined(tmp_path / "t.parquet", others))
    *before, _ = rows
    with pytest.raises(UserError, match="other texts"):
        list(joined(tmp_path / "t.parquet", [*before, replace(rows[-1], answers=(Answer(text="y"),))]))


def test_a_writer_that_stops_leaves_the_old_table_and_no_runs(small, tmp_path):
    write_rows(tmp_path / "t.parquet", [row(0)])
    with pytest.raises(RuntimeError), rows_writer(tmp_path / "t.parquet") as table:
        for n in range(300, 0, -1):
            table.add(row(n))
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"] and len(RowTable(tmp_path / "t.parquet")) == 1


# The peak of a process that does this with so many rows, out of order, above its imports.
PEAK = """
import random, resource, sys
from pathlib import Path
from rankwise.rows import RowTable, write_rows
from rankwise.types import Answer, Row, text_prompt
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def rows(count):
    rng = random.Random(0)
    for n in range(count):
        answers = tuple(Answer(text=f"answer {k} of {n} " * 40, token_ids=tuple(range(60))) for k in range(2))
        yield Row(id=f"{rng.getrandbits(64):016x}", prompt=text_prompt(f"prompt {n}"), answers=answers)
path = Path(sys.argv[1])
write_rows(path, rows(int(sys.argv[2])))
assert sum(len(row.answers) for row in RowTable(path)) == 2 * int(sys.argv[2])
print(peak())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_a_table(tmp_path):
    """Written out of order and read: 120,000 rows of 2 KB each, three times as many as 40,000. Held in memory as rows
    the difference would be 400 MB, as Arrow columns 160 MB."""
    peaks = []
    for count in (40_000, 120_000):
        words = [sys.executable, "-c", PEAK, str(tmp_path / "t.parquet"), str(count)]
        peaks.append(int(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 60_000, peaks  # KiB


def test_no_more_of_a_table_is_in_memory_than_a_part(small, tmp_path, monkeypatch):
    """Rows that somebody still holds are counted: of a table that is read and written again there are a few dozen."""
    import gc

    write_rows(tmp_path / "t.parquet", (row(n) for n in range(1000)))
    most = 0

    def watched():
        nonlocal most
        for number, one in enumerate(RowTable(tmp_path / "t.parquet")):
            if number % 100 == 99:
                most = max(most, sum(type(thing) is Row for thing in gc.get_objects()))
            yield one

    write_rows(tmp_path / "again.parquet", watched())
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "t.parquet").read_bytes()
    assert most < 1100, "a part that is read and a part that waits to be written"


# What was seen


def test_what_was_seen_is_known_with_its_first_note():
    seen = Seen(["a"])
    assert seen.first("b", "1") is None and seen.first("b", "2") == "1" and seen.note("b") == "1"
    assert "a" in seen and "c" not in seen and seen.note("c") is None
    assert seen.add("c") and not seen.add("c")
    assert seen.add("\ud800"), "half a character is a name too"


def test_without_room_for_what_was_seen_a_folder_is_asked_for():
    seen = Seen()
    seen._db.execute("COMMIT")
    seen._db.execute("PRAGMA max_page_count = 2")
    with pytest.raises(UserError, match="SQLITE_TMPDIR"):
        for n in range(1000):
            seen.add(str(n))


def test_different_things_are_counted_through_merges(monkeypatch):
    monkeypatch.setattr("rankwise.seen.COUNTED_TOGETHER", 10)
    distinct = Distinct()
    for n in range(1000):
        distinct.add((n % 77, "x"))
    assert len(distinct) == 77
    distinct.add("new")
    assert len(distinct) == 78


# The benchmark


def test_recipes_of_the_soak_are_accepted(tmp_path):
    found = soak._recipe({"opening_words": 12, "embedded": soak.SIZES})
    (tmp_path / "tiny.json").write_text(json.dumps(found))
    assert recipe.apply(tmp_path / "tiny.json", tmp_path / "params.yaml")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_records_are_as_many_as_asked_for_and_no_two_alike(tmp_path, ending):
    soak_records.write_records(tmp_path / f"r.{ending}", 50)
    if ending == "jsonl":
        found = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    else:
        found = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert len({one["id"] for one in found}) == len({one["prompt"] for one in found}) == 50


def runs_of(what: str, *found: tuple[int, int, float]) -> list[dict]:
    """Runs of (rows, peak MiB, CPU seconds)."""
    return [
        {"what": what, "factor": 1, "rows": rows, "peak_bytes": mib * 2**20, "cpu_s": cpu_s, "wall_s": cpu_s}
        for rows, mib, cpu_s in found
    ]


@pytest.mark.parametrize(
    "runs, missed",
    [
        (runs_of("doctor", (1000, 500, 5.0), (11_000, 501, 6.0), (21_000, 501, 7.0)), []),
        (
            runs_of("doctor", (1000, 500, 5.0), (11_000, 510, 6.0), (21_000, 520, 7.0)),
            ["doctor: memory a row more"],
        ),
        (
            runs_of("doctor", (1000, 500, 5.0), (11_000, 500, 6.0), (21_000, 500, 8.0)),
            ["doctor: time a row more, largest to smallest"],
        ),
        (runs_of("sft", (1000, 500, 5.0), (11_000, 600, 6.0)), []),
        (runs_of("sft", (1000, 2000, 5.0)), ["peak memory of any stage (sft)"]),
    ],
)
def test_a_stage_that_grows_misses_its_bound(runs, missed):
    """10 MiB for 10,000 rows are 1,049 bytes a row; the second 10,000 rows in 2 s cost twice those of the first."""
    figures = soak._figures(soak._lines(runs), soak._options([]))
    assert [name for name, one in figures.items() if not one.met] == missed


def test_the_figure_is_drawn(tmp_path):
    lines = soak._lines(runs_of("doctor", (1000, 500, 5.0), (11_000, 510, 6.0)))
    soak_figure.draw(lines, tmp_path / "soak.png", limit_mib=1536)
    assert 5_000 < (tmp_path / "soak.png").stat().st_size < 100_000


@pytest.mark.parametrize(
    "options, said",
    [(["--stages", "dokter"], "dokter"), (["--records", "-1"], "--records"), (["--where", "/no/such"], "/no/such")],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(options, said, monkeypatch):
    monkeypatch.setattr(soak, "scratch_copy", lambda *_, **__: pytest.fail("copied in spite of it"))
    with pytest.raises(UserError, match=said):
        soak.main(options)
