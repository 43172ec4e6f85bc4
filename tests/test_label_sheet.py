"""A label sheet: blind, the same for the same seed, harmless in a spreadsheet, and read back to the character."""

from __future__ import annotations

import csv
import html
import io
import re
from pathlib import Path

import pytest

from rankwise.judging import judge_rows
from rankwise.rows import write_rows
from rankwise.store import Store
from rankwise.stored_judge import StoredJudge
from rankwise.types import Answer, Message, Row, UserError
from tasks.label_sheet import COLUMNS, NO_LIMIT, as_csv, as_html, draw, harmless, main

HOSTILE = '<script>alert(1)</script> & "quotes" \u202e </pre><|im_start|>'


def rows(count: int = 12, k: int = 3) -> list[Row]:
    prompt = lambda n: (Message(role="user", content=f"question {n}"),)
    answers = lambda n: tuple(Answer(text=f"answer {n}.{place}", source=f"model-{place}") for place in range(k))
    return [Row(id=f"r{n}", prompt=prompt(n), answers=answers(n)) for n in range(count)]


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline="")))


def test_as_many_prompts_as_there_are_before_a_second_pair_of_any():
    pairs = draw(rows(), 15, seed=0)
    prompts = [pair.prompt for pair in pairs]
    assert len(set(prompts[:12])) == 12 and len({pair.key for pair in pairs}) == 15
    assert len(draw(rows(), 36, seed=0)) == 36


def test_the_seed_alone_decides_whatever_the_order_of_rows_and_answers():
    turned = [Row(id=row.id, prompt=row.prompt, answers=row.answers[::-1]) for row in reversed(rows())]
    assert draw(rows(), 20, seed=1) == draw(turned, 20, seed=1) != draw(rows(), 20, seed=2)


def test_which_answer_stands_first_is_drawn():
    """400 coins: further than 60 from the middle happens less than once in a billion seeds."""
    pairs = draw(rows(400, k=2), 400, seed=3)
    swapped = sum(pair.first.endswith(".1") for pair in pairs)
    assert 140 < swapped < 260


def test_nothing_in_a_sheet_says_who_wrote_an_answer_or_which_row_it_is_of():
    pairs = draw(rows(), 12, seed=0)
    for text in (as_csv(pairs), as_html(pairs)):
        assert "model-" not in text and '"r1"' not in text


def test_answers_with_one_text_are_no_pair():
    twins = [Row(id="r", prompt=(Message(role="user", content="q"),), answers=tuple(Answer(text=t) for t in "xxy"))]
    assert len(draw(twins, 1, seed=0)) == 1
    with pytest.raises(UserError, match=r"--rows 2: there are 1 pairs"):
        draw(twins, 2, seed=0)


def test_texts_that_a_spreadsheet_would_cut_are_left_out():
    long = [Row(id="r", prompt=(Message(role="user", content="q"),), answers=(Answer(text="x" * 40), Answer(text="y")))]
    assert len(draw(long, 1, seed=0, longest=40)) == 1
    with pytest.raises(UserError, match=r"there are 0 pairs of different answers of at most 39 characters"):
        draw(long, 1, seed=0, longest=39)


STARTS = ("=", "+", "-", "@", "\t", "\r", "＝", "\u00a0=", "\ufeff+")


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("before", ["", " ", "  "])
def test_no_cell_is_a_formula(start, before):
    text = f'{before}{start}HYPERLINK("http://evil")'
    assert harmless(text) == f"'{text}"
    row = Row(id="r", prompt=(Message(role="user", content="q"),), answers=(Answer(text=text), Answer(text="plain")))
    (line,) = read(as_csv(draw([row], 1, seed=0)))
    assert not any(value.lstrip(" ").startswith(STARTS) for value in line.values())


@pytest.mark.parametrize("end", [";", ",", "\t", "\n", "\r\n", "; "])
@pytest.mark.parametrize("start", ["=", "@", "＋"])
def test_no_cell_is_a_formula_where_a_spreadsheet_cuts_at_another_sign(end, start):
    text = harmless(f"good{end}{start}HYPERLINK(1)")
    assert not any(cell.lstrip().startswith(start) for cell in re.split("[;,\t\r\n]", text))
    assert text.replace("'", "") == f"good{end}{start}HYPERLINK(1)"


def test_other_texts_are_shown_as_they_are():
    assert harmless("1 - 2 = -1") == "1 - 2 = -1"
    row = Row(id="r", prompt=(Message(role="user", content="a\nb"),), answers=(Answer(text=HOSTILE), Answer(text='"')))
    (line,) = read(as_csv(draw([row], 1, seed=0)))
    assert tuple(line) == COLUMNS and line["prompt"] == "[user] a\nb" and {line["A"], line["B"]} == {HOSTILE, '"'}


def filled(text: str, better, delimiter: str = ",") -> str:
    """The sheet as a spreadsheet saves it: texts trimmed and cut, the verdict and the name filled in."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, delimiter=delimiter)
    writer.writeheader()
    for line in read(text):
        verdict = "A" if better(line["A"]) else "B"
        shown = {name: line[name].strip()[:20] for name in ("prompt", "A", "B")}
        writer.writerow({**line, **shown, "verdict": verdict, "annotator": "ann"})
    return f"\ufeff{out.getvalue()}"


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_filled_sheet_is_a_judge_as_it_is(tmp_path, delimiter):
    """Who prefers odd places: that comes back for every pair of the rollouts, in both orders."""
    texts = [
        "=even 0 with a long tail of words ",
        " odd 1 with a long tail of words",
        "-even 2, cut by the sheet",
        "+odd",
    ]
    row = Row(
        id="r", prompt=(Message(role="user", content="q\n"),), answers=tuple(map(lambda t: Answer(text=t), texts))
    )
    sheet = filled(as_csv(draw([row], 6, seed=0)), lambda text: "odd" in text, delimiter)
    (tmp_path / "people.csv").write_text(sheet, encoding="utf-8", newline="")
    judge = StoredJudge(tmp_path / "people.csv")
    with Store(tmp_path / "store.sqlite") as store:
        replies, _ = judge_rows(judge, [row], store)
    by_places = {reply.question.places: reply.said for reply in replies}
    mixed = [(i, j) for i in range(4) for j in range(4) if i % 2 != j % 2]
    assert all(by_places[i, j] == ("A" if i % 2 else "B") for i, j in mixed)
    assert all(reply.values is not None for reply in replies)


def test_an_empty_sheet_is_no_judge(tmp_path):
    (tmp_path / "people.csv").write_text(as_csv(draw(rows(), 3, seed=0)), encoding="utf-8", newline="")
    with pytest.raises(UserError, match=r"no line gives a verdict"):
        StoredJudge(tmp_path / "people.csv")


def test_the_form_shows_hostile_text_as_text_and_sends_nothing():
    row = Row(id="r", prompt=(Message(role="user", content=HOSTILE),), answers=(Answer(text=HOSTILE), Answer(text="x")))
    page = as_html(draw([row], 1, seed=0, longest=NO_LIMIT))
    assert page.count("<script>") == 1 and "alert(1)" in page  # ours, and the answer's as text
    assert html.escape("<script>alert(1)</script>") in page
    assert "default-src &#x27;none&#x27;" in page
    assert not re.search(r'(src|href|action)\s*=\s*"', page)


def test_the_command_writes_a_sheet_and_never_over_one(tmp_path, capsys):
    write_rows(tmp_path / "rollouts.parquet", rows())
    out = tmp_path / "sheet.csv"
    command = ["--rows", "5", "--out", str(out), "--rollouts", str(tmp_path / "rollouts.parquet")]
    assert main(command) == 0 and len(read(out.read_bytes().decode())) == 5
    before = out.read_bytes()
    assert before.startswith("\ufeff".encode())
    assert main([*command, "--seed", "1"]) == 2 and "is there already" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main([*command[:3], str(tmp_path / "form.html"), *command[4:]]) == 0
    assert Path(tmp_path / "form.html").read_text().count("<fieldset") == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "5", "--out", "sheet.xlsx"], "ends in .csv or .html"),
        (["--rows", "0", "--out", "sheet.csv"], "at least one pair"),
        (["--rows", "5", "--out", "sheet.csv", "--rollouts", "gone.parquet"], "gone.parquet: no such table"),
    ],
)
def test_mistakes_on_the_command_line_are_told(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(options) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told


def test_a_first_line_end_of_a_text_is_shown(tmp_path):
    """A browser drops the line end that a pre begins with: one more stands there."""
    row = Row(id="r", prompt=(Message(role="text", content="\nq"),), answers=(Answer(text="\nx"), Answer(text="y")))
    page = as_html(draw([row], 1, seed=0))
    assert {text.removeprefix("\n") for text in re.findall("<pre>(.*?)</pre>", page, re.S)} == {"\nq", "\nx", "y"}


def test_a_sheet_that_cannot_be_written_says_so(tmp_path, capsys):
    write_rows(tmp_path / "rollouts.parquet", rows())
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "sheet.csv"
    assert main(["--rows", "3", "--rollouts", str(tmp_path / "rollouts.parquet"), "--out", str(out)]) == 2
    assert "sheet.csv: cannot be written" in capsys.readouterr().err
