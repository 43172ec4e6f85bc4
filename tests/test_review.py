"""Laws of the review page: the most doubtful label first, all counted, and nothing that is data ever runs."""

from __future__ import annotations

import html
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rankwise.rows import read_rows, write_rows
from rankwise.types import Answer, Message, Row, text_prompt
from rankwise.verdicts import LOG3, Question, Reply, Verdict, write_verdicts
from tasks import doubts, markup, review, review_page
from tests import tiny

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
FLAGS += ("--disable-background-networking", "--disable-component-update")

RUNS = "document.title='ran'"
HOSTILE = (
    f"<script>{RUNS}</script>",
    f"</div></details></main><script>{RUNS}</script>",
    f'<img src=x onerror="{RUNS}">',
    f'" autofocus onfocus="{RUNS}" x="',
    f"' onmouseover='{RUNS}' onload='{RUNS}",
    f"<svg onload={RUNS}>",
    f"<details open ontoggle={RUNS}>",
    f"--><!-- </style></title></textarea></pre><script>{RUNS}</script>",
    f"<iframe srcdoc='<script>parent.{RUNS}</script>'></iframe>",
    "<style>*{display:none}</style><base href='//x/'><meta http-equiv=refresh content='0;url=javascript:1'>",
    f"&lt;script&gt;{RUNS}&lt;/script&gt; &#60;b&#62; &amp;",
)


def verdict(
    row: str, shown: tuple[int, ...], values: tuple[float, ...] | None, judge: str = "judge", **more
) -> Verdict:
    rest = {"sample": 0, "attempts": 1, "mass": 1.0, "said": "", "reason": "", "raw": "", "prompt_tokens": 0}
    rest |= {"completion_tokens": 0, **more}
    return Verdict(row_id=row, judge=judge, shown=shown, values=values, **rest)


def both_orders(row: str, i: int, j: int, odds: float, bias: float = 0.0, judge: str = "judge") -> list[Verdict]:
    """A judge that prefers i to j by odds, and whatever stands first by bias; nats."""
    return [verdict(row, (i, j), (odds + bias, 0.0), judge), verdict(row, (j, i), (bias - odds, 0.0), judge)]


def row(name: str, *texts: str, prompt: str = "say something") -> Row:
    return Row(id=name, prompt=text_prompt(prompt), answers=tuple(Answer(text=text) for text in texts))


def found(rows, verdicts, gold=None, **more) -> dict[tuple[str, int, int], dict[str, float]]:
    """Kinds of doubt by row and places, preferred answer first."""
    by_row = lambda some: {name: list(mine) for name, mine in itertools.groupby(some, key=lambda one: one.row_id)}
    compared = compare(rows, by_row(verdicts), by_row(gold or ()), **more)
    return {(one.row.id, one.left, one.right): one.kinds for one in compared}


def compare(rows, by_row, gold=None, **more) -> list[doubts.Comparison]:
    of = lambda some, row: some.get(row.id, ())
    return [one for row in rows for one in doubts.compare(row, of(by_row, row), of(gold or {}, row), **more)]


def choose(compared, limit):
    chosen = doubts.Chosen(limit)
    for one in compared:
        chosen.add(one)
    shown, totals = chosen.shown()
    return [one for one, _ in shown], totals


def judged(rows, by_row):
    return ((row, by_row.get(row.id, ())) for row in rows)


class Seen(HTMLParser):
    """What a browser would make of a page: its elements in order, and the texts of blocks of data."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.scripts, self.texts, self._depth, self._in = [], [], 0, ""
        self.feed(page)
        self.close()

    def handle_starttag(self, name, attributes):
        given = dict(attributes)
        self.elements.append((name, tuple(sorted(given))))
        if name in ("script", "style"):
            self._in = name
        if self._depth:
            self._depth += name not in ("meta", "input", "img")
        elif "text" in (given.get("class") or "").split():
            self._depth = 1
            self.texts.append("")

    def handle_endtag(self, name):
        self._in = ""
        self._depth -= bool(self._depth)

    def handle_data(self, data):
        if self._in == "script":
            self.scripts.append(data)
        if self._depth:
            self.texts[-1] += data


def written(path: Path, rows, verdicts, **more) -> str:
    by_row: dict[str, list[Verdict]] = {}
    for one in verdicts:
        by_row.setdefault(one.row_id, []).append(one)
    review.write(path, judged(rows, by_row), **more)
    return path.read_text(encoding="utf-8")


# What is doubtful ----------------------------------------------------------------------------------------------------


def test_a_judge_that_takes_whichever_is_first_flips():
    kinds = found(
        [row("a", "x", "y"), row("b", "x", "y")], [*both_orders("a", 0, 1, 0.1, 1.0), *both_orders("b", 0, 1, 1.0, 0.1)]
    )
    assert kinds["a", 0, 1] == {"flip": pytest.approx(0.9)}, "the two orders say +1.1 and -0.9"
    assert kinds["b", 0, 1] == {}


def test_a_tie_in_one_order_is_no_flip_and_contradicts_nobody():
    pair = [verdict("a", (0, 1), (LOG3, 0.0)), verdict("a", (1, 0), (0.0, 0.0))]
    other = both_orders("a", 0, 1, 0.0, judge="other")
    assert found([row("a", "x", "y")], [*pair, *other], both_orders("a", 0, 1, 0.0, judge="gold")) == {("a", 0, 1): {}}


def test_judges_of_a_panel_that_prefer_different_answers_disagree():
    kinds = found([row("a", "x", "y")], [*both_orders("a", 0, 1, 2.0), *both_orders("a", 0, 1, -0.5, judge="other")])
    assert kinds == {("a", 0, 1): {"panel": pytest.approx(0.5)}}


def test_gold_contradicts_where_it_names_the_other_answer():
    rows = [row("a", "x", "y"), row("b", "x", "y")]
    said = [*both_orders("a", 0, 1, -2.0), *both_orders("b", 0, 1, -2.0)]
    kinds = found(
        rows, said, [*both_orders("a", 0, 1, LOG3, judge="people"), *both_orders("b", 1, 0, LOG3, judge="people")]
    )
    assert kinds == {("a", 1, 0): {"gold": pytest.approx(LOG3)}, ("b", 1, 0): {}}


def test_of_a_circle_the_weakest_comparison_is_the_doubtful_one():
    said = [*both_orders("a", 0, 1, 2.0), *both_orders("a", 1, 2, 1.5), *both_orders("a", 2, 0, 0.25)]
    kinds = found([row("a", "x", "y", "z")], said)
    assert {pair for pair, mine in kinds.items() if "circle" in mine} == {("a", 2, 0)}


def test_what_a_file_does_not_answer_is_no_invalid_reply(tmp_path):
    silent = [verdict("a", shown, None, "people", answered=False) for shown in ((1, 2), (2, 1))]
    assert found([row("a", "x", "y", "z")], silent) == {}
    page = written(tmp_path / "page.html", [row("a", "x", "y", "z")], [*both_orders("a", 1, 2, 1.0), *silent])
    assert "0 replies invalid" in page and "not answered" in page


def test_an_invalid_reply_is_shown_with_the_answers_that_it_saw_and_makes_no_label():
    said = [verdict("a", (1, 2), None, reason="no JSON"), *both_orders("a", 1, 2, 1.0)[1:]]
    assert found([row("a", "x", "y", "z")], said) == {("a", 1, 2): {"invalid": 0.0}}
    shown, _ = choose(compare([row("a", "x", "y", "z")], {"a": said}), 3)
    assert shown[0].odds is None


def test_scores_contradict_by_their_differences():
    score = lambda place, value, judge: verdict("a", (place,), (value,), judge)
    said = [score(0, 1.0, "one"), score(1, 3.0, "one"), score(0, 2.0, "two"), score(1, 1.5, "two")]
    assert found([row("a", "x", "y")], said) == {("a", 1, 0): {"panel": pytest.approx(0.5)}}


def test_judges_that_cancel_out_are_a_tie_whatever_the_rounding():
    said = [
        *both_orders("a", 0, 1, 1.1),
        *both_orders("a", 0, 1, -1.1, judge="other"),
        *both_orders("a", 0, 1, 0.0, judge="x"),
    ]
    compared = compare([row("a", "x", "y")], {"a": said}, {"a": both_orders("a", 1, 0, LOG3, judge="people")})
    assert [(one.odds, set(one.kinds), one.neighbours) for one in compared] == [(0.0, {"panel"}, False)]


def test_what_is_a_tie_contradicts_nothing():
    assert found([row("a", "x", "y")], both_orders("a", 0, 1, 0.1, 0.2), tie_below=0.15) == {("a", 0, 1): {}}
    assert found([row("a", "x", "y")], both_orders("a", 0, 1, 0.1, 0.2)) == {("a", 0, 1): {"flip": pytest.approx(0.1)}}


# What is shown -------------------------------------------------------------------------------------------------------


def many(count: int, seed: int = 0) -> tuple[list[Row], list[Verdict]]:
    """Rows of two answers, and a judge with noise and a liking for the first."""
    rng = random.Random(seed)
    rows = [row(f"row-{n:04d}", f"one {n}", f"two {n}", prompt=f"question {n}") for n in range(count)]
    return rows, [one for r in rows for one in both_orders(r.id, 0, 1, rng.gauss(0, 1), 0.5)]


def test_the_more_contradictions_meet_the_earlier_and_then_the_surer_they_are():
    rows = [row(name, "x", "y") for name in "abcd"]
    said = [*both_orders("a", 0, 1, 0.1, 0.5), *both_orders("b", 0, 1, 0.1, 2.0), *both_orders("c", 0, 1, 0.1, 0.2)]
    said += both_orders("d", 0, 1, 3.0)
    gold = {"c": both_orders("c", 1, 0, LOG3, judge="people")}
    by_row = {name: [one for one in said if one.row_id == name] for name in "abcd"}
    shown, totals = choose(compare(rows, by_row, gold), 10)
    assert [one.row.id for one in shown] == ["c", "b", "a", "d"]
    assert totals["flip"] == (3, 3) and totals["gold"] == (1, 1)


def test_of_each_kind_the_limit_is_shown_and_all_are_counted():
    rows, said = many(400)
    by_row = {r.id: said[2 * n : 2 * n + 2] for n, r in enumerate(rows)}
    compared = compare(rows, by_row)
    flips = [one for one in compared if "flip" in one.kinds]
    shown, totals = choose(compared, 7)
    assert totals["flip"][1] == len(flips) > 50 and totals["flip"][0] >= 7
    assert totals["random"] == (7, 400)
    smallest = sorted(compared, key=lambda one: one.gap)[:7]
    assert [one for one in shown if "close" in one.kinds] == sorted(smallest, key=lambda one: one.doubt)
    assert len(shown) <= 7 * len(totals)


def test_shuffled_tables_give_the_same_page(tmp_path):
    rows, said = many(60)
    other_rows, pairs = rows[::-1], [said[n : n + 2][::-1] for n in range(0, len(said), 2)]
    random.Random(1).shuffle(pairs)
    one = written(tmp_path / "a.html", rows, said)
    other = written(tmp_path / "b.html", other_rows, [v for pair in pairs for v in pair])
    unordered = lambda page: sorted(re.findall(r"<tr>.*?</tr>", page))
    assert unordered(one) == unordered(other)
    order = lambda page: re.findall(r"question \d+", page)
    assert order(one) == order(other)


def test_nothing_judged_is_a_page_that_says_so(tmp_path):
    assert "no verdict to look at" in written(tmp_path / "a.html", [row("a", "x", "y")], [])
    assert "no verdict to look at" in written(tmp_path / "b.html", [], [])


def test_the_first_comparison_is_open_and_says_all_that_is_known_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_JUDGE_PRICE_IN", "2")
    monkeypatch.setenv("RANKWISE_JUDGE_PRICE_OUT", "8")
    say = {"said": "A", "raw": '{"verdict": "A", "reason": "it is first"}', "reason": "it is first"}
    say |= {"prompt_tokens": 1_000_000, "completion_tokens": 500_000, "attempts": 2, "mass": 0.875}
    said = [verdict("a", shown, (LOG3, 0.0), "gpt", **say) for shown in ((0, 1), (1, 0))]
    rows = [row("a", "two words", "three little words", prompt="why?"), *many(3)[0]]
    page = written(tmp_path / "a.html", rows, [*said, *many(3)[1]])
    first = page.partition("<details open")[2] or page.partition("open>")[2]
    first = html.unescape(re.sub(r"<[^>]*>", " ", first.partition("</main>")[0].split('<details class="one"')[0]))
    for text in (
        "why?",
        "two words",
        "three little words",
        "2 words",
        "3 words",
        "it is first",
        '"verdict": "A"',
        "A: answer 1",
    ):
        assert text in first, text
    for text in (
        "A: answer 2",
        "+1.10",
        "-1.10",
        "0.875",
        "1,000,000 + 500,000",
        "2 attempts",
        "These replies cost 12.00",
    ):
        assert text in first, text
    assert "gpt takes whichever is shown first" in first
    assert "rank 1 of 2" in first and "strength +0.00" in first


def test_ranks_are_those_that_are_trained_on_where_they_are_given(tmp_path):
    trained = Row(id="a", prompt=text_prompt("p"), answers=(Answer(text="y", rank=0, strength=1.5),))
    page = written(tmp_path / "a.html", [row("a", "x", "y")], both_orders("a", 0, 1, 1.0), ranked=[trained])
    assert "rank 1 of 1 · strength +1.50 · 1 words" in page and "rank 2" not in page


def test_records_of_the_table_are_the_comparisons_of_the_page(tmp_path):
    rows, said = many(40)
    records = review.write(tmp_path / "a.html", [(r, said[2 * n : 2 * n + 2]) for n, r in enumerate(rows)])
    assert (tmp_path / "a.html").read_text().count('<details class="one"') == len(records)
    json.dumps(records, allow_nan=False)
    assert [record["number"] for record in records] == list(range(1, len(records) + 1))


# Data is data --------------------------------------------------------------------------------------------------------


def hostile_tables(texts) -> tuple[list[Row], list[Verdict], list[Verdict]]:
    """Every field that anybody fills, filled with each text in turn; of each kind of doubt something."""
    rows, said, gold = [], [], []
    judges, people = f"judge {texts[0]}", f"people {texts[1]}"
    for n, text in enumerate(texts):
        prompt = (Message(role=f"user{text}", content=f"p {text}"), Message(role="assistant", content=f"q {text}"))
        answers = tuple(Answer(text=f"{k} {text}", source=f"by {text}") for k in range(3))
        rows.append(Row(id=f"row {n} {text}", prompt=prompt, answers=answers))
        say = {"said": f"A {text}", "reason": f"r {text}", "raw": f"w {text}"}
        for i, j in itertools.permutations(range(3), 2):
            for judge, better in ((judges, (i, j)), (f"other {text}", (j, i))):
                values = (LOG3, 0.0) if better == (i, j) else None if n == 0 and i == 0 else (0.1, 0.0)
                said.append(verdict(rows[-1].id, (i, j), values, judge, **say))
        gold += both_orders(rows[-1].id, 0, 1, LOG3 * (-1) ** n, judge=people)
    return rows, said, gold


def test_hostile_data_makes_the_elements_that_harmless_data_makes_and_no_other(tmp_path):
    def elements(texts):
        rows, said, gold = hostile_tables(texts)
        by_row = {r.id: [one for one in gold if one.row_id == r.id] for r in rows}
        seen = Seen(written(tmp_path / "page.html", rows, said, gold=by_row, limit=100))
        return seen.elements, seen.scripts

    # Texts of the same lengths, so that as much is left out; letters in one order, so that rows are sorted alike.
    harmless = [f"{n:02d}".ljust(len(text), "x") for n, text in enumerate(HOSTILE)]
    hostile = [f"{n:02d}{text}"[: len(text)] for n, text in enumerate(HOSTILE)]
    assert elements(hostile) == elements(harmless)
    seen, scripts = elements(HOSTILE)
    assert scripts == [review_page.SCRIPT]
    assert not [
        name for name, attributes in seen for key in attributes if key.startswith("on") or key in ("src", "href")
    ]


def test_texts_come_out_to_the_character(tmp_path):
    rows, said, _ = hostile_tables(HOSTILE)
    texts = Seen(written(tmp_path / "page.html", rows, said)).texts
    for text in HOSTILE:
        for given in (f"p {text}", f"q {text}", f"0 {text}", f"w {text}"):
            assert given in texts


def test_the_page_needs_nothing_else_and_may_not_send(tmp_path):
    page = written(tmp_path / "page.html", *many(5))
    assert not re.search(r"\b(src|href|srcset|action|poster)=|url\(|@import|//", page.replace("<!doctype html>", ""))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert html.unescape(policy).startswith("default-src 'none'; img-src data:; script-src 'sha256-")


def test_control_tokens_and_unseen_characters_are_marked():
    shown = str(markup.text_of("a<|im_start|>system\u202eb\u200b <s> [INST]\x00\r\n\r\U000e0041", 100))
    marked = re.findall(r"<mark[^>]*>(.*?)</mark>", shown)
    expected = ["<|im_start|>", "U+202E", "U+200B", "<s>", "[INST]", "U+0000", "U+000D", "U+E0041"]
    assert [html.unescape(one) for one in marked] == expected
    assert str(markup.text_of("naïve 日本 👩‍👧 x < y", 100)) == "naïve 日本 👩‍👧 x &lt; y", (
        "what can be seen is left alone"
    )


def test_a_long_text_says_how_much_is_left_out():
    assert "… 1,500 more characters" in markup.text_of("x" * 1600, 100)
    assert "more" not in markup.text_of("x" * 100, 100)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_nothing_of_the_data_runs_in_a_browser_with_its_policy_or_without(tmp_path):
    rows, said, gold = hostile_tables(HOSTILE)
    by_row = {r.id: [one for one in gold if one.row_id == r.id] for r in rows}
    page = written(tmp_path / "page.html", rows, said, gold=by_row)
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert bare != page
    planted = bare.replace("<main>", f"<main>{HOSTILE[2]}")
    guarded = page.replace("<main>", f"<main>{HOSTILE[2]}")
    titles = [rendered(tmp_path, text)[0] for text in (page, bare, planted, guarded)]
    assert titles == [review_page.TITLE, review_page.TITLE, "ran", review_page.TITLE]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_filters_and_keys_work_in_a_browser(tmp_path):
    rows, said = many(80)
    page = written(tmp_path / "page.html", rows, said)
    script = """
        const visible = () => [...document.querySelectorAll('.one')].filter(one => one.offsetParent);
        const press = key => document.dispatchEvent(new KeyboardEvent('keydown', {key}));
        const told = [visible().length];
        document.querySelector('input[value=flip]').click();
        told.push(visible().length, visible().every(one => one.dataset.kinds.includes('flip')));
        press('j'); press('j'); press('o');
        told.push(visible().indexOf(document.activeElement.parentElement), visible()[1].open);
        document.title = JSON.stringify(told);
    """
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    title, _ = rendered(tmp_path, bare.replace("</body>", f"<script>{script}</script></body>"))
    everything, flips = page.count('<details class="one"'), page.count('data-kinds="flip')
    assert json.loads(html.unescape(title)) == [everything, flips, True, 1, True] and flips < everything


def rendered(folder: Path, page: str) -> tuple[str, str]:
    """Title and elements of a page after its scripts ran."""
    (folder / "rendered.html").write_text(page, encoding="utf-8")
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *FLAGS, profile, "--virtual-time-budget=3000", "--dump-dom", f"file://{folder}/rendered.html"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return re.search(r"<title>(.*?)</title>", dom)[1], dom


# How it is made ------------------------------------------------------------------------------------------------------


def test_eight_thousand_verdicts_take_less_than_two_seconds_and_a_small_page(tmp_path):
    rng = random.Random(0)
    rows, by_row = [], {}
    for n in range(667):
        rows.append(row(f"row-{n}", *(f"answer {k} of {n} " + "word " * 150 for k in range(4)), prompt="prompt " * 80))
        places = itertools.combinations(range(4), 2)
        by_row[rows[-1].id] = [v for i, j in places for v in both_orders(rows[-1].id, i, j, rng.gauss(0, 1), 0.3)]
    began = time.process_time()
    review.write(tmp_path / "page.html", judged(rows, by_row))
    assert time.process_time() - began < 2.0
    assert sum(map(len, by_row.values())) > 8000
    assert (tmp_path / "page.html").stat().st_size < 2e6


def test_stage_verdicts_writes_the_page_beside_its_metrics_and_the_same_one_again(tmp_path):
    project = tiny.Project(tmp_path / "project")
    rows = [row(f"row-{n}", " a superb chase", " a dull yawn", " rain") for n in range(4)]
    write_rows(project.root / "data/rollouts.parquet", rows)
    (project.root / "recipes/judges.py").write_text("def longer(prompt, answer):\n    return len(answer)\n")
    project.change({"verdicts": {"judge": {**tiny.JUDGE, "kind": "callable", "function": "recipes.judges:longer"}}})
    pages = []
    for _ in range(2):
        said = project.run("verdicts")
        assert said.status == 0, said.err
        pages.append((project.root / "reports/verdicts/review.html").read_text())
    assert pages[0] == pages[1]
    assert "12 replies of" in pages[0] and "answer 1 over answer 2" in pages[0]


@pytest.fixture
def tables(tmp_path):
    """A folder with tables on disk: two judges, one of them people."""
    rows, said = many(20)
    people = [verdict(one.row_id, one.shown, (0.0, LOG3), "people") for one in said]
    by_id = {r.id: r for r in rows}
    replies = [(one.judge, "identity", _reply(by_id[one.row_id], one)) for one in (*said, *people)]
    write_rows(tmp_path / "rollouts.parquet", rows)
    write_verdicts(tmp_path / "verdicts.parquet", replies)
    return tmp_path


def _reply(of: Row, one: Verdict) -> Reply:
    answers = tuple(of.answers[place].text for place in one.shown)
    return Reply(
        question=Question(row_id=of.id, prompt=of.prompt, answers=answers, places=one.shown), values=one.values
    )


def by_hand(folder: Path, *options: str) -> subprocess.CompletedProcess:
    tables = ("--rollouts", folder / "rollouts.parquet", "--verdicts", folder / "verdicts.parquet")
    command = [sys.executable, "-m", "tasks.review", *map(str, tables), "--out", str(folder / "page.html"), *options]
    return subprocess.run(command, cwd=tiny.ROOT, env=os.environ, capture_output=True, text=True)


def test_by_hand_a_judge_of_the_table_can_be_gold(tables):
    told = by_hand(tables, "--gold-judge", "people", "--limit", "3")
    assert told.returncode == 0, told.stderr
    page = (tables / "page.html").read_text()
    assert "against gold" in page and "40 replies of judge ·" in page


def test_by_hand_an_unknown_judge_is_named_with_those_that_there_are(tables):
    told = by_hand(tables, "--judge", "gpt-5")
    assert told.returncode == 2 and "no verdict of gpt-5; judges there are judge, people" in told.stderr


def test_by_hand_verdicts_on_other_texts_are_refused_by_the_row(tables):
    rows = read_rows(tables / "rollouts.parquet")
    write_rows(tables / "rollouts.parquet", [replace(one, answers=one.answers[::-1]) for one in rows])
    told = by_hand(tables)
    assert told.returncode == 2 and "the tables do not belong together" in told.stderr and rows[0].id in told.stderr
