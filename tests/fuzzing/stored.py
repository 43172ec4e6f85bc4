"""Readers of verdicts in files: what people and other judges said, and sheets that came back filled in."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from random import Random
from typing import Any

from rankwise.store import Store
from rankwise.stored_judge import StoredJudge
from rankwise.types import Answer, Message, Row, text_prompt
from rankwise.verdicts import Question, write_verdicts
from tasks.label_sheet import as_csv, draw

from . import arrow, octets, trees
from .law import Files, holds, reader
from .replies import _check_reply

CHAT = (Message(role="user", content="Which?"),)
ROWS = (
    Row(id="r1", prompt=text_prompt("Which?"), answers=(Answer(text="x"), Answer(text="=y"), Answer(text="z\r\n"))),
    Row(id="r2", prompt=CHAT, answers=(Answer(text="a, b"), Answer(text='"q"'))),
)
QUESTIONS = [
    Question(row_id=row.id, prompt=row.prompt, answers=(row.answers[i].text, row.answers[j].text), places=(i, j))
    for row in ROWS
    for i in range(len(row.answers))
    for j in range(len(row.answers))
    if i != j
]


def _line(random: Random) -> dict[str, Any]:
    question = random.choice(QUESTIONS)
    about = random.choice(
        ({"row_id": question.row_id}, {"prompt": "Which?"}, {"prompt": [{"role": "user", "content": "Which?"}]})
    )
    more = {"annotator": random.choice(("ann", "bob", "")), "order": random.choice(("none", "shown", ""))}
    more = random.choice(({}, more, {**more, "reason": "because"}))
    if random.random() < 0.3:
        return {**about, "answers": [{"text": a.text, "rank": n} for n, a in enumerate(ROWS[0].answers)], **more}
    said = random.choice(({"verdict": random.choice(("A", "b", "tie", ""))}, {"value": random.choice((0.5, "-1", 2))}))
    return {**about, "first": question.answers[0], "second": question.answers[1], **said, **more}


def _lines(random: Random) -> list[Any]:
    lines = [_line(random) for _ in range(random.choice((1, 2, 3, 8)))]
    return [trees.changed(random, one) if random.random() < 0.4 else one for one in lines]


def _jsonl(random: Random) -> bytes:
    data = trees.octets("".join(trees.as_json(random, one) + "\n" for one in _lines(random)))
    return octets.spoilt(random, data, data) if random.random() < 0.3 else data


def _csv(random: Random) -> bytes:
    lines = [one for one in _lines(random) if isinstance(one, dict)]
    names = [*dict.fromkeys(str(name) for one in lines for name in one)] or ["prompt"]
    out = io.StringIO()
    writer = csv.writer(out, delimiter=random.choice(",,;\t"))
    writer.writerow(names)
    for one in lines:
        cells = [json.dumps(one[n]) if isinstance(one.get(n), (list, dict)) else one.get(n, "") for n in names]
        try:
            writer.writerow(cells)
        except ValueError:
            continue
    data = trees.octets(out.getvalue())
    return octets.spoilt(random, data, data) if random.random() < 0.4 else data


def _file(random: Random) -> Files:
    kind = random.randrange(8)
    if kind < 3:
        return {"people.jsonl": _jsonl(random)}
    if kind < 5:
        return {"people.csv": _csv(random)}
    if kind == 5:
        return {"people.parquet": arrow.parquet(random, _lines(random))}
    if random.random() < 0.002:
        return {"people.jsonl.gz": octets.bomb(random.choice((b"\0", b"[", b" ")) * 2**20, 48)}
    return {"people.jsonl.gz": octets.zipped(random, _jsonl(random))}


def _sheet(random: Random) -> Files:
    """A sheet that people have filled in, and that what they filled it in with has spoilt."""
    lines = [*csv.reader(io.StringIO(as_csv(draw(ROWS, 3, seed=0)).removeprefix("\ufeff")))]
    for line in lines[1:]:
        line[4] = random.choice(("A", "b", "tie", "", "C", " a "))
    out = io.StringIO()
    out.write(random.choice(("", "\ufeff")))
    csv.writer(out, delimiter=random.choice(",;\t")).writerows(lines)
    data = out.getvalue().encode(random.choice(("utf-8", "utf-8", "utf-16", "latin-1")), "replace")
    return {"sheet.csv": octets.spoilt(random, data, data) if random.random() < 0.6 else data}


def _read(folder: Path) -> None:
    [path] = folder.iterdir()
    judge = StoredJudge(path)
    holds(judge.identity, "a judge without an identity")
    asked = [*judge.ask(QUESTIONS)]
    holds([number for number, _ in asked] == [*range(len(QUESTIONS))], "questions without an answer")
    with Store(folder / "store.sqlite") as store:
        store.put_many({str(number): raw for number, raw in asked})
        kept = store.get_many(map(str, range(len(QUESTIONS))))
    replies = [judge.read(question, kept[str(number)]) for number, question in enumerate(QUESTIONS)]
    for reply in replies:
        _check_reply(reply)
    holds(all(value is None or all(map(math.isfinite, value)) for value in (r.values for r in replies)), "no number")
    for question in QUESTIONS:
        judge.notice(question)
    idle, lines = judge.idle()
    holds(0 <= idle <= lines, "lines that are not there")
    write_verdicts(folder / "verdicts.parquet", [("people", judge.identity, reply) for reply in replies])


reader(name="stored", make=_file, read=_read, weight=1.8)
reader(name="sheet", make=_sheet, read=_read, weight=0.5)
