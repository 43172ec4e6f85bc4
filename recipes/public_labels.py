"""Public labels -> rows, stored judges and verdict tables, so that judges of others run through the same code as ours.

    python -m recipes.public_labels mt_bench PATH --out FOLDER    or pandalm, llmbar, alpacaeval, oasst
    python -m recipes.public_labels report PATH                   every number that is known of them, beside ours

PATH holds the folders mt_bench, pandalm, llmbar, alpacaeval_kway and oasst_kway (report: also imdb). FOLDER gets

    rollouts.parquet         the rows: a prompt and its answers, whose source is the model that wrote them
    stored/NAME.jsonl        what each judge said, as rankwise.stored_lines reads it; people.jsonl: people, who are gold
    verdicts/NAME.parquet    the same as tables of verdicts (rankwise.verdicts); each of the people is a judge there

Where a source keeps one verdict a pair and not the order in which the answers were shown, it is taken for both orders
(order: none): such a judge's position bias cannot be seen any more. LLMBar alone keeps both orders. MT-Bench says which
of GPT-4's verdicts changed with the order; they are ties here, with that as their reason.

MT-Bench: in a second turn each model continued its own conversation, so what follows the first question is the answer.
Some models gave the same answer, and were judged differently against a third: one text is one question, so these are
votes of an annotator's double, "NAME (2)".
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.rows import write_aside, write_rows
from rankwise.stored_judge import StoredJudge
from rankwise.stored_lines import records
from rankwise.types import Answer, Message, Row, UserError
from rankwise.verdicts import Question, Reply, write_verdicts

PEOPLE = "people"
FLIPPED = "tie (inconsistent)"  # MT-Bench: the verdict changed with the order
SURE = 1e-9  # AlpacaEval: probabilities are kept this far from 0 and 1, whose log-odds are no numbers

Lines = dict[str, list[dict[str, Any]]]  # judge -> its lines, as rankwise.stored_lines reads them


@dataclass(frozen=True, kw_only=True)
class Labels:
    """A source: its rows, and who said what about them. One of the judges is PEOPLE."""

    rows: list[Row]
    judges: Lines


def mt_bench(folder: Path) -> Labels:
    """56 questions of two turns, answers of 6 models; all 15 pairs judged by GPT-4, 2,399 votes of people."""
    asked = {record["question_id"]: record["turns"] for record in _read(folder / "questions.jsonl.gz")}
    answers: dict[int, dict[str, list[str]]] = defaultdict(dict)
    for record in _read(folder / "answers.jsonl.gz"):
        answers[record["question_id"]][record["model"]] = record["turns"]
    texts = {
        f"mt-{question}-{turn}": {model: _conversation(asked[question], said, turn) for model, said in by_model.items()}
        for question, by_model in answers.items()
        for turn in (1, 2)
    }
    rows = [
        _row(row_id, asked[int(row_id.split("-")[1])][0], by_model, turn=int(row_id[-1]), group=row_id.split("-")[1])
        for row_id, by_model in texts.items()
    ]
    judges: Lines = {"gpt4": [], PEOPLE: []}
    for name, file in (("gpt4", "gpt4_pair_votes"), (PEOPLE, "human_votes")):
        for record in _read(folder / f"{file}.jsonl.gz"):
            row_id, models = f"mt-{record['question_id']}-{record['turn']}", [record["model_a"], record["model_b"]]
            first, second = (texts[row_id][model] for model in models)
            verdict = {"model_a": "A", "model_b": "B"}.get(record["winner"], "tie")
            line = _line(row_id, first, second, verdict, reason=FLIPPED if record["winner"] == FLIPPED else "")
            judges[name].append({**line, "annotator": record["judge"], "models": models})
    return Labels(rows=rows, judges={name: _numbered(lines) for name, lines in judges.items()})


def pandalm(folder: Path) -> Labels:
    """Pairs of answers to instructions: three people, gpt-3.5 and PandaLM-7B."""
    rows, judges = [], defaultdict(list)
    for record in _read(folder / "pairs.jsonl.gz"):
        prompt = "\n\n".join(part for part in (record["instruction"], record["input"]) if part)
        texts = [record["response1"], record["response2"]]
        answers = tuple(Answer(text=t, source=record[m]) for t, m in zip(texts, ("model1", "model2")))
        rows.append(Row(id=record["id"], prompt=_user(prompt), answers=answers))
        said = lambda number, **more: _line(record["id"], *texts, ("tie", "A", "B")[number], **more)  # noqa: B023
        judges[PEOPLE] += [said(number, annotator=str(n)) for n, number in enumerate(record["human"], 1)]
        if record["judge_gpt35"] is not None:
            judges["gpt35"].append(said(record["judge_gpt35"], reason=record["judge_gpt35_reason"] or ""))
        judges["pandalm7b"].append(said(record["judge_pandalm7b"]))
    return Labels(rows=rows, judges=dict(judges))


def llmbar(folder: Path) -> Labels:
    """Pairs of which one follows the instruction, by construction; 65 judges, each in both orders."""
    rows, judges = [], defaultdict(list)
    for record in _read(folder / "pairs.jsonl.gz"):
        texts = [record["output_1"], record["output_2"]]
        meta = {"subset": record["subset"].removeprefix("LLMBar/")}
        answers = tuple(Answer(text=text) for text in texts)
        rows.append(Row(id=record["id"], prompt=_user(record["input"]), answers=answers, meta=meta))
        judges[PEOPLE].append(_line(record["id"], *texts, "AB"[record["label"] - 1]))
        for name, verdicts in record["judges"].items():
            # The second verdict is of the swapped order and names the outputs, not the places.
            for shown, verdict, letters in ((texts, verdicts[0], "AB"), (texts[::-1], verdicts[1], "BA")):
                if verdict is not None:
                    line = _line(record["id"], *shown, letters[int(verdict) - 1], order="shown")
                    judges[_file_name(name)].append(line)
    return Labels(rows=rows, judges=dict(judges))


def alpacaeval(folder: Path) -> Labels:
    """17 models' answers; GPT-4-turbo against gpt4_1106_preview, GPT-4 against text_davinci_003."""
    rows, judges = [], defaultdict(list)
    for record in _read(folder / "groups.jsonl.gz"):
        texts = {response["model"]: response["text"] for response in record["responses"]}
        rows.append(_row(record["prompt_id"], record["instruction"], texts, source_set=record["source_set"]))
        for response in record["responses"]:
            for judge, baseline, line in _against_baselines(response):
                if response["model"] != baseline and baseline in texts and texts[baseline] != response["text"]:
                    pair = _line(record["prompt_id"], response["text"], texts[baseline], None)
                    judges[judge].append({**pair, **line, "models": [response["model"], baseline]})
    return Labels(rows=rows, judges={name: _numbered(lines) for name, lines in judges.items()})


def oasst(folder: Path) -> Labels:
    """Answers of models to OpenAssistant's prompts, ranked by people, K of 2 to 9."""
    rows, lines = [], []
    for record in _read(folder / "groups.jsonl.gz"):
        prompt = tuple(Message(role=turn["role"], content=turn["content"]) for turn in record["prompt_messages"])
        answers = tuple(Answer(text=r["text"], source=r["model_name"] or "person") for r in record["responses"])
        rows.append(Row(id=record["id"], prompt=prompt, answers=answers, meta={"group": record["tree_id"]}))
        ranks = [{"text": r["text"], "rank": r["rank"]} for r in record["responses"]]
        lines.append({"row_id": record["id"], "answers": ranks})
    return Labels(rows=rows, judges={PEOPLE: lines})


SOURCES: dict[str, tuple[str, Callable[[Path], Labels]]] = {
    "mt_bench": ("mt_bench", mt_bench),
    "pandalm": ("pandalm", pandalm),
    "llmbar": ("llmbar", llmbar),
    "alpacaeval": ("alpacaeval_kway", alpacaeval),
    "oasst": ("oasst_kway", oasst),
}


def load(name: str, path: Path) -> Labels:
    """A source, from the folder that holds all of them."""
    folder, read = SOURCES[name]
    return read(path / folder)


def write(labels: Labels, folder: Path) -> dict[str, int]:
    """Write rows, stored lines and tables of verdicts; returns how many verdicts each judge has."""
    write_rows(folder / "rollouts.parquet", labels.rows)
    counts = {}
    for name, lines in labels.judges.items():
        path = folder / "stored" / f"{name}.jsonl"
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))  # noqa: B023
        voters = sorted({line.get("annotator", "") for line in lines}) if name == PEOPLE else [""]
        replies = [
            (voter or name, judge.identity, reply)
            for voter in voters
            for judge in [StoredJudge(path, annotator=voter)]
            for reply in replies_of(judge, labels.rows, lines, voter)
        ]
        counts[name] = write_verdicts(folder / "verdicts" / f"{name}.parquet", replies)
    return counts


def replies_of(
    judge: StoredJudge, rows: Sequence[Row], lines: Sequence[Mapping[str, Any]], voter: str = ""
) -> list[Reply]:
    """What a stored judge says to every question that its lines (voter: those of one) speak of, pairs both ways."""
    places = {row.id: {answer.text: place for place, answer in enumerate(row.answers)} for row in rows}
    asked: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for line in (line for line in lines if voter in ("", line.get("annotator"))):
        mine = places[line["row_id"]]
        texts = [answer["text"] for answer in line["answers"]] if "answers" in line else [line["first"], line["second"]]
        shown = tuple(mine[text] for text in texts)
        asked[line["row_id"]] |= {shown[n:] + shown[:n] for n in range(len(shown))}
    questions = [
        Question(row_id=row.id, prompt=row.prompt, answers=tuple(row.answers[n].text for n in shown), places=shown)
        for row in rows
        for shown in sorted(asked[row.id])
        if len({row.answers[n].text for n in shown}) == len(shown)
    ]
    return [judge.read(questions[index], raw) for index, raw in judge.ask(questions)]


def _against_baselines(response: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(judge, the model that it compared with, what it said) of a response."""
    p, outcome = response["judge_gpt4turbo_p"], response["judge_gpt4_vs_davinci003"]
    if p is not None:
        kept = min(max(p, SURE), 1 - SURE)
        yield "gpt4turbo", "gpt4_1106_preview", {"value": math.log(kept) - math.log1p(-kept)}
    if outcome is not None:
        yield "gpt4", "text_davinci_003", {"verdict": {1.0: "A", 0.5: "tie", 0.0: "B"}[outcome]}


def _conversation(questions: Sequence[str], said: Sequence[str], turn: int) -> str:
    """What a model's answer is: its first turn; or what follows the first question, with both of its turns."""
    return said[0] if turn == 1 else f"{said[0]}\n\n[user] {questions[1]}\n\n[assistant] {said[1]}"


def _row(row_id: str, question: str, texts: Mapping[str, str], **meta: object) -> Row:
    answers = tuple(Answer(text=texts[model], source=model) for model in sorted(texts))
    return Row(id=row_id, prompt=_user(question), answers=answers, meta=meta)


def _user(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def _line(
    row_id: str, first: str, second: str, verdict: str | None, *, order: str = "none", **more: str
) -> dict[str, Any]:
    said = {} if verdict is None else {"verdict": verdict}
    return {"row_id": row_id, "first": first, "second": second, **said, "order": order, **more}


def _numbered(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines in which every annotator speaks once of two texts; who speaks again is NAME (2), NAME (3), …"""
    times: dict[tuple, int] = defaultdict(int)
    found = []
    for line in lines:
        name = line.get("annotator", "")
        about = (name, line["row_id"], frozenset((line["first"], line["second"])))
        times[about] += 1
        found.append({**line, "annotator": f"{name} ({times[about]})" if times[about] > 1 else name})
    return found


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "_", name)


def _read(path: Path) -> list[Mapping[str, Any]]:
    return [record for _, record in records(path)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.public_labels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=[*SOURCES, "report"])
    parser.add_argument("path", type=Path, help="folder that holds the sources' folders")
    parser.add_argument("--out", type=Path, help="folder to write; needed for all but report")
    arguments = parser.parse_args(argv)
    try:
        if arguments.what == "report":
            from recipes.public_numbers import report

            print(report(arguments.path))
            return 0
        if arguments.out is None:
            raise UserError("--out is missing: name the folder to write")
        counts = write(load(arguments.what, arguments.path), arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, count in sorted(counts.items()):
        print(f"{name:<40} {count:>7,} verdicts")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
