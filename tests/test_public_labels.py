"""Public labels become rows, stored judges and tables that keep every verdict; known numbers come out exactly.

The real files are no part of this project. RANKWISE_PUBLIC_DATA names the folder that holds them, for the slow test.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from rankwise.agreement import flip_rate, pairs_of
from rankwise.ranking import rank
from rankwise.rows import read_rows
from rankwise.stored_judge import StoredJudge
from rankwise.verdicts import LOG3, Verdict, read_verdicts
from recipes import public_labels, public_numbers
from recipes.public_labels import PEOPLE, SOURCES, load, main, write
from recipes.public_tables import board, grid, tournament, win_rates

REAL = os.environ.get("RANKWISE_PUBLIC_DATA")
MODELS = [f"model-{n}" for n in range(6)]  # the first is the best


def lines(path: Path, records: Sequence[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps(record) + "\n" for record in records)


def made_mt_bench(folder: Path) -> None:
    """One question, two turns. GPT-4 goes by the models' numbers but for one tie; in turn 1 two models answer alike."""
    text = lambda n, turn: "the same" if turn == 1 and n in (1, 2) else f"said by {n} in turn {turn}{'.' * n}"
    lines(
        folder / "questions.jsonl.gz", [{"question_id": 82, "category": "x", "reference": None, "turns": ["q1", "q2"]}]
    )
    answers = [{"model": m, "question_id": 82, "turns": [text(n, 1), text(n, 2)]} for n, m in enumerate(MODELS)]
    lines(folder / "answers.jsonl.gz", answers)
    vote = lambda judge, a, b, turn, winner: {
        **{"judge": judge, "model_a": a, "model_b": b, "turn": turn, "question_id": 82, "winner": winner}
    }
    pairs = [(a, b, turn) for turn in (1, 2) for a, b in itertools.combinations(MODELS, 2)]
    said = lambda a, b, turn: "tie (inconsistent)" if (a, b) == (MODELS[4], MODELS[5]) else "model_a"
    lines(folder / "gpt4_pair_votes.jsonl.gz", [vote("gpt4_pair", *pair, said(*pair)) for pair in pairs])
    people = [
        vote("ann", MODELS[3], MODELS[0], 2, "model_b"),  # as GPT-4, told the other way round
        vote("bob", MODELS[3], MODELS[0], 2, "model_a"),  # not as GPT-4
        vote("ann", MODELS[4], MODELS[5], 1, "tie"),  # GPT-4's changed with the order, which counts as a tie
        vote("ann", MODELS[3], MODELS[5], 1, "tie"),  # GPT-4 says model_a
        vote("ann", MODELS[1], MODELS[5], 1, "model_a"),
        vote("ann", MODELS[2], MODELS[5], 1, "model_b"),  # of the same texts as the line before
    ]
    lines(folder / "human_votes.jsonl.gz", people)


def made_pandalm(folder: Path) -> None:
    record = lambda n, human, gpt35, pandalm: {
        **{
            "id": f"p{n}",
            "instruction": "do",
            "input": "this" if n else "",
            "judge_gpt35_reason": "why",
            "human": human,
        },
        **{"response1": f"long answer {n}", "response2": f"short {n}", "model1": "a", "model2": "b"},
        **{"human_majority": max(set(human), key=human.count), "judge_gpt35": gpt35, "judge_pandalm7b": pandalm},
    }
    lines(
        folder / "pairs.jsonl.gz",
        [
            record(0, [1, 1, 2], 1, 1),
            record(1, [0, 0, 0], 0, 2),
            record(2, [2, 2, 1], None, 1),
            record(3, [2, 2, 2], 1, 2),
        ],
    )


def made_llmbar(folder: Path) -> None:
    """One judge that is always right, one that always says the first, one that did not answer once."""
    parts = ["Natural", *(f"Adversarial/{name}" for name in public_numbers.SUBSETS[1:])]
    records = [
        {
            **{"id": f"b{n}", "subset": f"LLMBar/{part}", "input": "do", "label": 1 + n % 2},
            **{"output_1": f"long answer {n}", "output_2": f"short {n}"},
            "judges": {
                "GPT-4/Vanilla": [str(1 + n % 2)] * 2,
                "First/CoT": ["1", "2"],
                "Shy/Swap": [str(1 + n % 2), None if n == 0 else str(1 + n % 2)],
            },
        }
        for n, part in enumerate(parts)
    ]
    lines(folder / "pairs.jsonl.gz", records)


def made_alpacaeval(folder: Path) -> None:
    response = lambda model, p, outcome: {
        "model": model, "text": f"by {model}", "judge_gpt4turbo_p": p, "judge_gpt4_vs_davinci003": outcome
    }  # fmt: skip
    responses = [
        response("gpt4_1106_preview", 0.5, None),
        response("text_davinci_003", 0.0, 0.5),
        response("good", 0.75, 1.0),
        response("bad", 0.25, 0.0),
    ]
    records = [
        {"prompt_id": f"a{n}", "source_set": "s", "instruction": f"do {n}", "k": 4, "responses": responses}
        for n in range(2)
    ]
    lines(folder / "groups.jsonl.gz", records)


def made_oasst(folder: Path) -> None:
    answer = lambda n, place: {
        **{"text": f"answer {(place * 5) % 7}", "rank": place, "synthetic": True},
        **{"model_name": None if n else "m", "message_id": f"m{place}"},
    }
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    records = [
        {
            **{"id": f"o{n}", "tree_id": f"t{n}", "prompt_messages": turns, "k": count, "unranked": 0},
            "responses": [answer(n, place) for place in range(count)][:: 1 if n else -1],
        }
        for n, count in enumerate((2, 3, 6))
    ]
    lines(folder / "groups.jsonl.gz", records)


def made_imdb(folder: Path) -> None:
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        texts = ["a good film, very good", "a bad film, very bad"] * 4
        pd.DataFrame({"text": texts, "label": [1, 0] * 4}).to_parquet(folder / f"{split}.parquet")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Small files of the same shapes as the public ones."""
    root = tmp_path_factory.mktemp("public")
    for folder, make in {
        "mt_bench": made_mt_bench,
        "pandalm": made_pandalm,
        "llmbar": made_llmbar,
        "alpacaeval_kway": made_alpacaeval,
        "oasst_kway": made_oasst,
        "imdb": made_imdb,
    }.items():
        make(root / folder)
    return root


def written(name: str, made: Path, folder: Path) -> tuple[dict, dict[str, dict[str, list[Verdict]]]]:
    """Rows by id, and each judge's table."""
    write(load(name, made), folder)
    tables = {path.stem: read_verdicts(path) for path in (folder / "verdicts").glob("*.parquet")}
    return {row.id: row for row in read_rows(folder / "rollouts.parquet")}, tables


# Every source


@pytest.mark.parametrize("name", SOURCES)
def test_rows_stored_lines_and_tables_belong_together(name, made, tmp_path):
    """Every verdict is on answers of a row; every stored file is a judge; the same bytes come out again."""
    rows, tables = written(name, made, tmp_path / "one")
    for judge, table in tables.items():
        assert table and StoredJudge(tmp_path / f"one/stored/{judge}.jsonl").pairwise
        for row_id, verdicts in table.items():
            assert all(max(verdict.shown) < len(rows[row_id].answers) for verdict in verdicts)
            assert any(verdict.values is not None for verdict in verdicts)
    assert main([name, str(made), "--out", str(tmp_path / "two")]) == 0
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert files and all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_a_source_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["oasst", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "groups.jsonl.gz: no such file" in capsys.readouterr().err
    assert main(["oasst", str(tmp_path)]) == 2
    assert "--out is missing" in capsys.readouterr().err


# MT-Bench


def test_a_second_turn_is_judged_with_the_first(made):
    rows = {row.id: row for row in load("mt_bench", made).rows}
    assert [message.content for message in rows["mt-82-2"].prompt] == ["q1"]
    assert rows["mt-82-2"].answers[3].text.startswith("said by 3 in turn 1...\n\n[user] q2\n\n[assistant] said by 3")
    assert rows["mt-82-1"].answers[3].text == "said by 3 in turn 1..."


def test_a_complete_tournament_becomes_its_ranking(made, tmp_path):
    """The models' own order; the last two tie, because GPT-4's verdict on them changed with the order."""
    rows, tables = written("mt_bench", made, tmp_path)
    judged = rank(rows["mt-82-2"], tables["gpt4"]["mt-82-2"], tie_below=0.05)
    assert [answer.source for answer in judged.row.answers] == MODELS
    assert [answer.rank for answer in judged.row.answers] == [0, 1, 2, 3, 4, 4]
    assert judged.circular_triads == 0 and judged.most_circular_triads == 8


def test_no_vote_is_lost_where_two_models_gave_one_answer(made, tmp_path):
    """Ann's two votes on the same two texts stand in the table as hers and her double's."""
    _, tables = written("mt_bench", made, tmp_path)
    votes = {(v.judge, v.said) for v in tables[PEOPLE]["mt-82-1"] if 5 in v.shown and v.shown[1] == 5}
    assert {("ann", "A"), ("ann (2)", "B")} <= votes


def test_mt_bench_counts_votes_as_they_were_counted(made):
    """Six votes: 1, 3 and 5 agree; neither says tie in 1, 2, 5 and 6, of which 1 and 5 agree."""
    found = {what: ours for what, _, ours in public_numbers.mt_bench(made)[0]}
    assert found["GPT-4 agrees with the vote, ties included"] == "0.5000"
    assert found["votes where neither says tie"] == "4" and found["GPT-4 agrees with those"] == "0.5000"
    assert found["GPT-4's verdicts that change with the order"] == "2 of 30"
    assert found["complete tournaments of K = 6"] == "2 of 2"
    # Turn 1's second and third model: four opponents judged again, none otherwise.
    assert found["two texts judged again, as other models' answers: other verdict"] == "0 of 4"


# PandaLM


def test_pandalm_agreement_counts_no_verdict_as_wrong(made):
    """gpt-3.5: right, right, silent, wrong; PandaLM-7B: right, wrong, wrong, right."""
    shown = public_numbers.pandalm(made)[0]
    agrees = [ours for what, _, ours in shown if "agrees with the majority" in what]
    assert agrees == ["0.500", "0.500"]
    assert next(ours for what, _, ours in shown if what.strip() == "of its 3 verdicts").startswith("0.667")


def test_three_people_are_one_judge_and_three(made, tmp_path):
    _, tables = written("pandalm", made, tmp_path)
    assert {verdict.judge for verdict in tables[PEOPLE]["p0"]} == {"1", "2", "3"}
    pooled = StoredJudge(tmp_path / f"stored/{PEOPLE}.jsonl")
    assert len(public_labels.replies_of(pooled, load("pandalm", made).rows, load("pandalm", made).judges[PEOPLE])) == 8


# LLMBar


def test_both_orders_of_llmbar_are_kept(made, tmp_path):
    """Who always says the first flips on every pair; who is always right never does, and is right in both orders."""
    rows, tables = written("llmbar", made, tmp_path)
    pairs = lambda judge: [pair for row in rows.values() for pair in pairs_of(row, tables[judge].get(row.id, ()))]
    assert flip_rate(pairs("First_CoT"), tie_below=0.0).mean == 1.0
    assert all(pair.bias == pytest.approx(LOG3) for pair in pairs("First_CoT"))
    assert flip_rate(pairs("GPT-4_Vanilla"), tie_below=0.0).mean == 0.0
    gold = {pair.row_id: pair.preference > 0 for pair in pairs(PEOPLE)}
    assert all((pair.preference > 0) == gold[pair.row_id] for pair in pairs("GPT-4_Vanilla"))
    assert len(pairs("Shy_Swap")) == len(rows) - 1, "one order alone is half position"


def test_llmbar_accuracy_is_that_of_single_verdicts(made):
    table = {row[0]: row for row in public_numbers.llmbar(made)[1][0]}
    assert set(table["First_CoT"][-6:]) == {"0.500"} and set(table["GPT-4_Vanilla"][-6:]) == {"1.000"}
    assert table["longer wins"][5:10] == ["1.000", "0.000", "1.000", "0.000", "1.000"]


# AlpacaEval


def test_probabilities_and_verdicts_against_a_baseline_become_a_board(made):
    labels = load("alpacaeval", made)
    assert win_rates(labels.judges["gpt4turbo"]) == pytest.approx(
        {"text_davinci_003": 0.0, "good": 0.75, "bad": 0.25}, abs=1e-8
    )
    assert win_rates(labels.judges["gpt4"]) == {"good": 1.0, "bad": 0.0}
    shown = board({"turbo": labels.judges["gpt4turbo"], "old": labels.judges["gpt4"]})
    assert [row[0] for row in shown[1:]] == ["good", "gpt4_1106_preview", "bad", "text_davinci_003"]
    assert next(row for row in shown if row[0] == "gpt4_1106_preview")[-4:] == ["", "", "", "0"], "judged by one only"


def test_a_tournament_counts_wins_ties_and_shares():
    played = [
        {"models": ["a", "b"], "verdict": "A"},
        {"models": ["b", "a"], "verdict": "tie"},
        {"models": ["a", "b"], "value": 0.0},
    ]
    wins, ties = tournament(played, ["a", "b"])
    assert wins.tolist() == [[0, 1.5], [0.5, 0]] and ties.tolist() == [[0, 1], [1, 0]]


# OpenAssistant


def test_rankings_of_people_come_out_as_they_went_in(made):
    found = {what: (known, ours) for what, known, ours in public_numbers.oasst(made)[0]}
    assert found["rankings that leave the K-way path as people gave them"] == ("3 of 3", "3 of 3")
    assert found["pairs in them"][1] == str(1 + 3 + 15)


# The report


def test_the_report_runs_on_every_source_and_says_what_differs(made, capsys):
    assert main(["report", str(made)]) == 0
    told = capsys.readouterr().out
    assert all(title in told for title in ("MT-Bench", "IMDb", "PandaLM", "LLMBar", "AlpacaEval", "OpenAssistant"))
    votes = next(line for line in told.splitlines() if line.startswith("votes of people"))
    assert votes.split()[-3:] == ["2,399", "6", "OTHER"]
    assert next(line for line in told.splitlines() if line.startswith("accuracy, test ")).endswith("1.000  OTHER")


def test_columns_stand_under_one_another():
    assert grid([["a", "bcd"], ["long", "x"]]) == "a     bcd\n----  ---\nlong  x"


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="RANKWISE_PUBLIC_DATA names no folder with the public files")
def test_every_known_number_but_one_comes_out_of_the_real_files(capsys):
    assert main(["report", REAL]) == 0
    told = capsys.readouterr().out
    compared = [line for line in told.splitlines() if line.endswith(("same", "OTHER"))]
    others = [line for line in compared if line.endswith("OTHER")]
    # That one was noted without the settings of its model; ours is 4 reviews of 2,821 away.
    assert len(compared) == 15 and [line.split("  ")[0] for line in others] == ["accuracy, validation"]
