"""The row store: what was committed survives a kill, the first value stays, damage is named."""

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_scoring import alone, tiny, token_rows

from rankwise.reference import score_rows
from rankwise.scoring import LogpModel
from rankwise.store import Store
from rankwise.types import UserError


def test_values_come_back_as_they_were(tmp_path):
    values = {"a": [1.5, -0.25], "b": {"text": '日本\n"x"', "none": None}, "c": 0.1 + 0.2}
    with Store(tmp_path / "deep" / "er" / "s.sqlite") as store:
        store.put_many(values)
    with Store(tmp_path / "deep" / "er" / "s.sqlite") as store:
        assert store.get_many(["a", "b", "c", "d"]) == values and len(store) == 3


def test_the_first_value_under_a_key_stays(tmp_path):
    with Store(tmp_path / "s.sqlite") as store:
        store.put_many({"a": 1})
        store.put_many({"a": 2, "b": 3})
        assert store.get_many(["a", "b"]) == {"a": 1, "b": 3}


def test_more_keys_than_one_query_takes(tmp_path):
    with Store(tmp_path / "s.sqlite") as store:
        store.put_many({str(i): i for i in range(2345)})
        assert store.get_many(map(str, range(2500))) == {str(i): i for i in range(2345)}
        assert store.get_many([]) == {}


def test_a_batch_is_written_whole_or_not_at_all(tmp_path):
    with Store(tmp_path / "s.sqlite") as store:
        with pytest.raises(TypeError):
            store.put_many({"a": 1, "b": object()})
        assert len(store) == 0


def test_two_processes_write_and_read_at_once(tmp_path):
    with Store(tmp_path / "s.sqlite") as one, Store(tmp_path / "s.sqlite") as other:
        one.put_many({"a": 1})
        assert other.get_many(["a"]) == {"a": 1}
        other.put_many({"b": 2})
        assert one.get_many(["b"]) == {"b": 2}


def test_processes_that_make_it_at_one_moment_wait_for_each_other(tmp_path):
    """As those of a launch do: SQLite itself makes none wait that changes how a file is written."""

    def opened(path, start) -> int:
        start.wait()
        with Store(path) as store:
            store.put_many({"a": 1})
            return len(store)

    for number in range(60):
        start = threading.Barrier(6)
        with ThreadPoolExecutor(6) as several:
            told = [several.submit(opened, tmp_path / f"{number}.sqlite", start) for _ in range(6)]
        assert [one.result() for one in told] == [1] * 6


def test_a_kill_loses_at_most_the_batch_in_flight(tmp_path):
    """The child tells each batch that put_many returned from, and is killed with kill -9 while it writes on."""
    script = textwrap.dedent(
        f"""
        import itertools
        from rankwise.store import Store
        with Store({str(tmp_path / "s.sqlite")!r}) as store:
            for n in itertools.count():
                store.put_many({{f"{{n}}/{{i}}": "x" * 200 for i in range(20)}})
                print(n, flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    told = [int(process.stdout.readline()) for _ in range(15)]
    os.kill(process.pid, signal.SIGKILL)
    told += [int(line) for line in process.stdout.read().split()]
    process.wait()
    with Store(tmp_path / "s.sqlite") as store:
        assert len(store.get_many(f"{n}/{i}" for n in told for i in range(20))) == 20 * len(told)
        assert len(store) in (20 * len(told), 20 * (len(told) + 1))  # the one in flight is there whole, or not
        store.put_many({"after": 1})


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, content):
    (tmp_path / "s.sqlite").write_bytes(content)
    with pytest.raises(UserError, match=r"s\.sqlite: not usable .* move it away"):
        Store(tmp_path / "s.sqlite")


def test_damage_inside_the_file_is_named_too(tmp_path):
    """The header is sound and the pages are not: seen only when rows are read or written."""
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        store.put_many({f"{i:05}": "x" * 300 for i in range(2000)})
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    data = bytearray(path.read_bytes())
    data[8192:] = os.urandom(len(data) - 8192)
    path.write_bytes(data)
    with pytest.raises(UserError, match="move it away"), Store(path) as store:
        store.get_many(f"{i:05}" for i in range(2000))
    with pytest.raises(UserError, match="move it away"), Store(path) as store:
        store.put_many({f"{i:05}x": 1 for i in range(2000)})


def test_a_folder_in_place_of_the_file_is_named(tmp_path):
    (tmp_path / "s.sqlite").mkdir()
    with pytest.raises(UserError, match="not usable"):
        Store(tmp_path / "s.sqlite")


# The reference's rows in the store


def reference(tmp_path, rows, *, weights="w", precision="fp32", model=None, max_tokens=40):
    module = LogpModel(model or tiny(), layout="shared")
    with Store(tmp_path / "reference.sqlite") as store:
        return score_rows(module, rows, weights=weights, precision=precision, store=store, max_tokens=max_tokens)


def test_reference_rows_are_the_models_and_are_computed_once(tmp_path):
    rows = token_rows(7)
    scored, computed = reference(tmp_path, rows)
    assert computed == 7 and [one.id for one in scored] == [row.id for row in rows]
    assert [x for one in scored for x in one.logps] == pytest.approx([x.item() for x in alone(tiny(), rows)], rel=1e-5)
    assert [one.tokens for one in scored] == [tuple(map(len, row.answers_ids)) for row in rows]
    assert reference(tmp_path, rows, max_tokens=10_000, model=tiny(seed=5)) == (scored, 0)  # it is not even asked


def test_one_new_row_costs_one_row(tmp_path):
    reference(tmp_path, token_rows(7))
    assert reference(tmp_path, token_rows(8))[1] == 1
    assert reference(tmp_path, token_rows(8)[::-1])[1] == 0


def test_a_hit_needs_the_same_weights_precision_and_tokens(tmp_path):
    rows = token_rows(3)
    reference(tmp_path, rows)
    assert reference(tmp_path, rows, weights="other")[1] == 3
    assert reference(tmp_path, rows, precision="bf16")[1] == 3
    shorter = [dataclasses.replace(row, prompt_ids=row.prompt_ids[1:] or (7,)) for row in rows]
    assert reference(tmp_path, shorter)[1] == 3
    renamed = [dataclasses.replace(row, id=row.id + "x", ranks=()) for row in rows]
    assert reference(tmp_path, renamed)[1] == 0  # neither the name nor the ranking is in a log-probability
