"""Rows of answers: asked for once, kept as they come, shared out among processes, whatever engine gives them."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import several
from fault_server import FaultServer
from test_rendering import CHATML, tokenizer
from test_scoring import tiny

from rankwise import rollouts
from rankwise.checkpoints import save_model
from rankwise.fingerprint import sampled_from, weights_digest
from rankwise.rendering import Renderer
from rankwise.rollouts import Request, sample_rows, with_teacher
from rankwise.sampling import Sampled, Sampling, Wanted
from rankwise.serving import server_environment
from rankwise.store import Store
from rankwise.types import Answer, Message, Row, Unavailable, UserError, text_prompt

BYTES = range(5 + 20, 5 + 180)  # ids of tokenizer()'s plain bytes


@dataclasses.dataclass
class Dice:
    """An engine whose tokens are all alike likely: answers are a function of the prompt's ids and the seed."""

    stop_after: int = 10**9  # prompts that it answers, then it raises error
    error: BaseException = dataclasses.field(default_factory=lambda: UserError("the dice are gone"))
    text: bool = False  # text alone
    nap_s: float = 0.0
    name: str = "dice"
    version: str = "dice 1"
    settled: bool = True
    asked: list[str] = dataclasses.field(default_factory=list)

    def identity(self) -> dict:
        return {"engine": self.name}

    def answers(self, wanted: Sequence[Wanted]) -> Iterator[tuple[int, list[Sampled]]]:
        for index in reversed(range(len(wanted))):
            if len(self.asked) == self.stop_after:
                raise self.error
            self.asked.append(wanted[index].name)
            time.sleep(self.nap_s)
            yield index, [self._one(wanted[index], seed) for seed in wanted[index].seeds]

    def _one(self, wanted: Wanted, seed: int) -> Sampled:
        stream = np.random.Generator(np.random.Philox(key=seed + sum(wanted.prompt_ids)))
        ids = [*map(int, stream.choice(BYTES, size=4)), 2]
        if self.text:
            return Sampled(token_ids=None, finish_reason="stop", seed=seed, text=f" said {ids[0]}. And {ids[1]}")
        return Sampled(token_ids=tuple(ids), finish_reason="stop", seed=seed, logps=(-5.0,) * len(ids))


def prompt_rows(count=5) -> list[Row]:
    return [Row(id=f"p{i}", prompt=text_prompt("word " * (i + 1)), meta={"n": i}) for i in range(count)]


def model(folder: Path) -> Path:
    made = tokenizer(bos=True, template=CHATML)
    save_model(tiny(vocab_size=len(made), pad_token_id=0), made, folder)
    return folder


@pytest.fixture
def asked(tmp_path) -> Request:
    return Request(folder=model(tmp_path / "model"), sampling=Sampling(max_new_tokens=6), k=3, batch_sequences=6)


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    with Store(tmp_path / "rows.sqlite") as opened:
        yield opened


# Once


def test_rows_are_answered_once_and_the_same_whatever_was_there(tmp_path, asked, store):
    rows, work = sample_rows(prompt_rows(), asked, store)
    assert work.computed == 5 and [len(row.answers) for row in rows] == [3] * 5
    with Store(tmp_path / "b") as bit_by_bit:
        sample_rows(prompt_rows(2), asked, bit_by_bit)
        again, work = sample_rows(prompt_rows(), dataclasses.replace(asked, batch_sequences=100), bit_by_bit)
    assert work.computed == 3
    ids = lambda rows: [[a.token_ids for a in row.answers] for row in rows]
    assert ids(again) == ids(rows)
    assert sample_rows(prompt_rows(), asked, store) == (
        rows,
        dataclasses.replace(work, computed=0, tokens_per_second=0),
    )


def test_rows_keep_what_was_sampled_and_say_where_it_is_from(asked, store):
    rows, _ = sample_rows(prompt_rows(), asked, store)
    renderer = Renderer(rollouts.load_tokenizer(asked.folder))
    for n, row in enumerate(rows):
        prompt_ids = renderer.render(row, ()).prompt_ids
        assert (row.id, row.meta["n"]) == (f"p{n}", n)
        assert row.meta["sampled_from"] == sampled_from(weights_digest(asked.folder), prompt_ids)
        for answer in row.answers:
            assert answer.source == "policy" and answer.finish_reason in ("stop", "length") and answer.seed >= 0
            assert len(answer.logps) == len(answer.token_ids) and max(answer.logps) < 0
            assert answer.engine.startswith("embedded-")
            assert answer.text == renderer.answer_text(prompt_ids, answer.token_ids)


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": 1}, {"round": 1}, {"k": 2}, {"max_prompt_tokens": 1}, {"precision": "bf16"}),
        *({"sampling": Sampling(max_new_tokens=6, **{name: 0.5})} for name in ("temperature", "top_p", "min_p")),
        {"sampling": Sampling(max_new_tokens=6, top_k=3)},
        {"sampling": Sampling(max_new_tokens=6, repetition_penalty=1.5)},
        {"sampling": Sampling(max_new_tokens=6, stop=("a",))},
        {"sampling": Sampling(max_new_tokens=6, stop_token_ids=(9,))},
        {"engine": "server"},
    ],
    ids=str,
)
def test_what_would_change_an_answer_is_in_its_key(asked, store, change):
    changed = dataclasses.replace(asked, **change)
    mine = Dice()
    mine.identity = rollouts.engine_of(asked).identity
    sample_rows(prompt_rows(2), asked, store, engine=mine)
    other = Dice()
    other.identity = rollouts.engine_of(changed).identity
    assert sample_rows(prompt_rows(2), changed, store, engine=other)[1].computed == 2


def test_what_changes_no_answer_is_in_no_key(asked, store, monkeypatch):
    sample_rows(prompt_rows(), asked, store)
    monkeypatch.setenv("RANKWISE_ROLLOUTS_URL", "http://127.0.0.1:9/v1")
    for change in ({"batch_sequences": 1}, {"source": "someone"}, {"prefix": "RANKWISE_OTHER"}):
        assert sample_rows(prompt_rows(), dataclasses.replace(asked, **change), store)[1].computed == 0
    served = dataclasses.replace(asked, engine="server")
    there = rollouts.engine_of(served).identity()
    monkeypatch.setenv("RANKWISE_ROLLOUTS_URL", "http://127.0.0.2:10/v1")
    assert rollouts.engine_of(dataclasses.replace(served, prefix="RANKWISE_TEACHER")).identity() == there


def test_other_end_tokens_are_other_answers(asked, store):
    """generation_config.json may name further end tokens: rows of the old ones must not be taken for the new."""
    sample_rows(prompt_rows(), asked, store)
    config = asked.folder / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": list(range(2, 100))}))
    rows, work = sample_rows(prompt_rows(), asked, store)
    assert work.computed == 5
    assert any(a.finish_reason == "stop" and a.token_ids[-1] != 2 for row in rows for a in row.answers)


# Kept as they come


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("error", [UserError("3 got no answer"), RuntimeError("a defect"), Stopped()], ids=repr)
def test_what_had_finished_is_kept_however_it_ends(asked, store, error):
    with pytest.raises(type(error)):
        sample_rows(prompt_rows(), asked, store, engine=Dice(stop_after=3, error=error))
    assert len(store) == 3
    rest = Dice()
    rows, work = sample_rows(prompt_rows(), asked, store, engine=rest)
    assert work.computed == len(rest.asked) == 2 and len(rows) == 5


@pytest.mark.parametrize("seconds", [0.0, 1e9])
@pytest.mark.parametrize("after", [0, 1, 8, 9, 15, 16, 20])
@pytest.mark.parametrize("where", ["engine", "bar"])
def test_stopped_anywhere_the_rest_is_computed_beside_the_same_neighbours(
    asked, store, tmp_path, monkeypatch, where, after, seconds
):
    """On a CPU, to the last bit: parts of 8 prompts, of which one that was broken off is answered whole."""
    monkeypatch.setattr(rollouts, "LOGP_DIGITS", 17)
    monkeypatch.setattr(rollouts, "COMMIT_S", seconds)
    asked = dataclasses.replace(asked, batch_sequences=12, sampling=Sampling(max_new_tokens=12))
    expected, _ = sample_rows(prompt_rows(21), asked, store)
    engine = rollouts.engine_of(asked)

    class Cut:
        def __getattr__(self, name):
            return getattr(engine, name)

        def answers(self, wanted):
            for number, answer in enumerate(engine.answers(wanted)):
                if (where, number) == ("engine", after):
                    raise Stopped
                yield answer

    class Bar(rollouts.Progress):
        calls = 0

        def advance(self, *_, **__):
            self.calls += 1
            if (where, self.calls) == ("bar", after + 1):
                raise Stopped

    whole = (after + (where == "bar")) // 8 * 8  # at the bar, that many answers have come
    whole = 21 if (where, after) == ("bar", 20) else whole
    with Store(tmp_path / "other.sqlite") as other:
        with monkeypatch.context() as patched, pytest.raises(Stopped):
            patched.setattr(rollouts, "Progress", Bar)
            sample_rows(prompt_rows(21), asked, other, engine=Cut())
        assert len(other) == whole
        rows, work = sample_rows(prompt_rows(21), asked, other)
    assert rows == expected and work.computed == 21 - whole


@pytest.mark.parametrize(("rows", "seconds", "commits"), [(2, 1e9, [2, 2, 1]), (64, 0.0, [1] * 5), (64, 1e9, [5])])
def test_rows_are_committed_after_so_many_or_so_long(asked, store, monkeypatch, rows, seconds, commits):
    monkeypatch.setattr(rollouts, "COMMIT_ROWS", rows)
    monkeypatch.setattr(rollouts, "COMMIT_S", seconds)
    sizes, put = [], store.put_many
    monkeypatch.setattr(store, "put_many", lambda fresh: sizes.append(len(fresh)) or put(fresh))
    sample_rows(prompt_rows(), asked, store, engine=Dice())
    assert [size for size in sizes if size] == commits


def test_a_newer_engine_takes_over_what_an_older_one_has_left(asked, store):
    with pytest.raises(UserError):
        sample_rows(prompt_rows(), asked, store, engine=Dice(stop_after=3))
    rows, _ = sample_rows(prompt_rows(), asked, store, engine=Dice(version="dice 2"))
    assert sorted({a.engine for a in row.answers} == {"dice 1"} for row in rows) == [False] * 2 + [True] * 3


# Text


def test_text_is_cut_before_the_first_stop_string_and_tokens_are_not(asked, store):
    asked = dataclasses.replace(asked, sampling=Sampling(max_new_tokens=6, stop=(". And", "never")))
    rows, _ = sample_rows(prompt_rows(1), asked, store, engine=Dice(text=True))
    assert all(a.text.startswith(" said") and "." not in a.text and a.token_ids is None for a in rows[0].answers)
    renderer = Renderer(rollouts.load_tokenizer(asked.folder))
    free, _ = sample_rows(prompt_rows(1), asked, store, engine=Dice(name="ids"))
    whole = renderer.answer_text(renderer.render(free[0], ()).prompt_ids, free[0].answers[0].token_ids)
    stop = Sampling(max_new_tokens=6, stop=(whole[2:],))
    rows, _ = sample_rows(prompt_rows(1), dataclasses.replace(asked, sampling=stop), store, engine=Dice(name="ids"))
    assert rows[0].answers[0].text == whole[:2] and len(rows[0].answers[0].token_ids) == 5


def test_a_teachers_ids_are_kept_where_they_mean_the_same():
    own, taught = (
        [Row(id="a", prompt=text_prompt("x"), answers=(Answer(text=t, token_ids=(1,), logps=(-1.0,), source=t),))]
        for t in ("policy", "teacher")
    )
    [same] = with_teacher(own, taught, same_tokenizer=True)
    assert same.answers == (*own[0].answers, *taught[0].answers)
    [other] = with_teacher(own, taught, same_tokenizer=False)
    assert other.answers[0] == own[0].answers[0]
    assert other.answers[1] == dataclasses.replace(taught[0].answers[0], token_ids=None, logps=None)


# Trouble


class Launch:
    """What the processes of a launch send to the first one."""

    def __init__(self):
        self.told = []

    def to_first(self, value: object) -> list:
        self.told.append(json.loads(json.dumps(value)))
        return self.told


@pytest.mark.parametrize("kind", [UserError, Unavailable])
def test_trouble_of_another_process_keeps_its_kind(kind):
    """The first process tells it, and its exit status says whether trying again may help."""
    launch = Launch()
    rollouts._raise(None, launch)
    with pytest.raises(kind, match=r"^the dice are gone"):
        rollouts._raise(kind("the dice are gone"), launch)
    with pytest.raises(kind, match="process 1 of this launch: the dice are gone") as told:
        rollouts._raise(None, launch)
    assert type(told.value) is kind


# From a server


@pytest.fixture
def served(asked) -> Request:
    return dataclasses.replace(asked, engine="server")


def test_a_server_that_runs_is_asked_what_the_store_lacks(served, store, monkeypatch):
    with FaultServer(faults={"error": 0.1, "busy": 0.1}) as server:
        monkeypatch.setenv("RANKWISE_ROLLOUTS_URL", server.url)
        rows, _ = sample_rows(prompt_rows(), served, store)
    renderer = Renderer(rollouts.load_tokenizer(served.folder))
    for row in rows:
        ids = renderer.render(row, ()).prompt_ids
        assert [a.text for a in row.answers] == [renderer.answer_text(ids, a.token_ids) for a in row.answers]
        assert {a.engine for a in row.answers} == {"vllm 9.9"}
        assert [a.seed - row.answers[0].seed for a in row.answers] == [0, 1, 2]
    # No server any more, and none is needed.
    assert sample_rows(prompt_rows(), served, store)[0] == rows


def test_a_teacher_known_by_its_name_is_asked_in_messages(store, monkeypatch):
    request = Request(
        folder=None, name="tiny", engine="server", sampling=Sampling(max_new_tokens=6), k=2, prefix="RANKWISE_TEACHER"
    )
    prompts = [Row(id="c", prompt=(Message(role="user", content="Why?"),))]
    with pytest.raises(UserError, match="set RANKWISE_TEACHER_URL to one that serves a model of this name"):
        sample_rows(prompts, request, store)
    with FaultServer(dialect="chat") as server:
        monkeypatch.setenv("RANKWISE_TEACHER_URL", server.url)
        rows, _ = sample_rows(prompts, request, store)
        assert [body["messages"] for body in server.asked] == [[{"role": "user", "content": "Why?"}]] * 2
    assert all(a.token_ids is None and a.text.startswith(" t") for a in rows[0].answers)
    assert "sampled_from" not in rows[0].meta


def test_a_server_of_ones_own_sees_one_gpu_and_nothing_of_the_launch():
    launch = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}
    environment, log = server_environment({**launch, "TORCHELASTIC_RUN_ID": "x", "HOME": "/h", "RANKWISE_HOME": "/r"})
    assert environment == {"HOME": "/h", "RANKWISE_HOME": "/r", "CUDA_VISIBLE_DEVICES": "1"}
    assert log == Path("/r/logs/server-1.log")
    devices = lambda given: server_environment({**launch, "CUDA_VISIBLE_DEVICES": given})[0]["CUDA_VISIBLE_DEVICES"]
    assert devices("4,6") == "6" and devices("") == ""
    assert "CUDA_VISIBLE_DEVICES" not in server_environment({})[0]
    for given in ("-1", "4", "4,-1,6"):
        with pytest.raises(UserError, match=rf"CUDA_VISIBLE_DEVICES is '{given}': \d GPU\(s\) for 2 processes"):
            devices(given)


# Shared out


def in_a_launch(folder: Path) -> None:
    """What each of two processes does, each as on a machine of its own; the second is slow and starts late."""
    import datetime

    import torch.distributed as dist

    from rankwise.parallel import processes

    # Less patient than gloo is by default, to see what may take longer than that.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
    rollouts.CHUNK_ROWS = 1  # p1 and p3 are two messages
    rank = processes().rank
    late = rank * 2.5
    time.sleep(late)
    engine = Dice(nap_s=late, version=f"dice of {rank}")
    request = Request(folder=folder / "model", sampling=Sampling(max_new_tokens=6), k=3)
    with Store(folder / f"machine-{rank}.sqlite") as store:
        rows, work = sample_rows(prompt_rows(5), request, store, engine=engine)
        told = {"asked": engine.asked, "rows": len(rows), "computed": work.computed, "held": len(store)}
    (folder / f"told-{rank}.json").write_text(json.dumps(told))


def in_a_launch_with_a_death(folder: Path) -> None:
    """Two processes of one machine; the second is killed before it answers its third prompt."""
    from rankwise.parallel import processes

    rollouts.COMMIT_ROWS = 1
    rank = processes().rank
    request = Request(folder=folder / "model", sampling=Sampling(max_new_tokens=6), k=3)

    class Mortal(Dice):
        def answers(self, wanted):
            for n, one in enumerate(super().answers(wanted)):
                if rank == 1 and n == 2:
                    os.kill(os.getpid(), 9)
                yield one

    with Store(folder / "rows.sqlite") as store:
        sample_rows(prompt_rows(12), request, store, engine=Mortal(nap_s=0.05))


def test_processes_share_what_no_machine_has_and_the_first_gets_all(tmp_path, monkeypatch):
    """p0 is on the first machine, p1 on the second; p2, p3, p4 are dealt out, shortest first. Waiting outlasts gloo."""
    request = Request(folder=model(tmp_path / "model"), sampling=Sampling(max_new_tokens=6), k=3)
    with Store(tmp_path / "whole.sqlite") as store:
        expected, _ = sample_rows(prompt_rows(5), request, store, engine=Dice())
    for rank in (0, 1):
        with Store(tmp_path / f"machine-{rank}.sqlite") as store:
            sample_rows(prompt_rows(2)[rank : rank + 1], request, store, engine=Dice())
    several.finished(several.launch(tmp_path, "in_a_launch", of="test_rollouts"))
    first, second = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1))
    assert (sorted(first["asked"]), second["asked"]) == (["p2", "p4"], ["p3"])
    assert (first["rows"], second["rows"]) == (5, 0) and first["computed"] == second["computed"] == 3
    assert (first["held"], second["held"]) == (5, 2)
    with Store(tmp_path / "machine-0.sqlite") as store:
        rows, work = sample_rows(prompt_rows(5), request, store, engine=Dice())
    assert work.computed == 0
    unsigned = lambda rows: [[dataclasses.replace(a, engine="") for a in row.answers] for row in rows]
    assert unsigned(rows) == unsigned(expected)
    assert {row.id: row.answers[0].engine for row in rows} == {
        **{"p0": "dice 1", "p1": "dice 1", "p2": "dice of 0", "p3": "dice of 1", "p4": "dice of 0"}
    }


@pytest.mark.slow
def test_a_launch_of_which_one_is_killed_is_continued_by_any_number(tmp_path):
    request = Request(folder=model(tmp_path / "model"), sampling=Sampling(max_new_tokens=6), k=3)
    process = several.launch(tmp_path, "in_a_launch_with_a_death", of="test_rollouts")
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    with Store(tmp_path / "rows.sqlite") as store:
        kept = len(store)
        assert 2 <= kept <= 8, said  # the second's two, and what the first had before it was told to leave
        rest = Dice()
        rows, work = sample_rows(prompt_rows(12), request, store, engine=rest)
        assert work.computed == len(set(rest.asked)) == len(rest.asked) == 12 - kept and len(store) == 12
    assert [row.id for row in rows] == [row.id for row in prompt_rows(12)]
