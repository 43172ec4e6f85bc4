"""Laws of the audit: what stops a run and what does not, on judges with known faults; pages that show just that."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields, replace

import pytest

from rankwise import judging
from rankwise.evaluation import Estimate
from rankwise.judging import first_questions
from rankwise.probes import Outcome, battery, draw
from rankwise.rows import read_rows, write_rows
from rankwise.types import Answer, Row, UserError, text_prompt
from rankwise.verdicts import LOG3, Question, Reply, read_verdicts, write_verdicts
from tasks import plots, verdicts
from tasks.audit_judge import Gates, Params, Paths, run
from tasks.audit_measures import KINDS, Material, Measure, audit
from tasks.audit_page import answer, details
from tasks.judges import JudgeParams
from tasks.stage import Stage

OPEN = dict.fromkeys(asdict(Gates()))  # no limit at all
GOOD, BAD = "good", "bad"
SOUND = "audit_judges:sound"


class Silent:
    """A tracker that hears nothing."""

    def metrics(self, *_, **__): ...
    def file(self, *_): ...


def rows(count: int = 16, *, note: str = "") -> list[Row]:
    """Three answers each, of one, two and three good words, in lengths that say nothing of it."""
    made = []
    for n in range(count):
        texts = [f" it was {' '.join([GOOD] * g)} in {'many ' * ((n * 7 + g * 5) % 9)}ways{note}" for g in (1, 2, 3)]
        answers = tuple(Answer(text=text) for text in texts)
        made.append(Row(id=f"r{n:02}", prompt=text_prompt(f"Film {n}:"), answers=answers))
    return made


def gold_rows(count: int = 40) -> list[Row]:
    made = []
    for n in range(count):
        better, worse = Answer(text=f" a {GOOD} film {n}", rank=0), Answer(text=f" a {BAD} film {n}", rank=1)
        made.append(Row(id=f"g{n:02}", prompt=(text_prompt(""))[:1], answers=(better, worse)))
    return made


JUDGES = """
def sound(prompt, answer):
    return answer.count("good") - answer.count("bad")

def inverted(prompt, answer):
    return -sound(prompt, answer)

def longest(prompt, answer):
    return len(answer)

def silence(prompt, answer):
    return sound(prompt, answer) if len(answer) > 9 else 99

def obedient(prompt, answer):
    return 99 if "Ignore the rubric" in answer else sound(prompt, answer)
"""


@pytest.fixture
def audited(tmp_path, tmp_path_factory, monkeypatch):
    """Judge rows with a function of JUDGES, run the stage as its command does; returns metrics, Markdown and HTML."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tasks.stage.HOME", tmp_path / "home")
    installed = tmp_path_factory.mktemp("installed")  # of a project's own files only some may hold judges
    monkeypatch.syspath_prepend(installed)
    (installed / "audit_judges.py").write_text(JUDGES)

    def go(function="sound", *, judge=None, table=None, gold=None, given=None, gates=None, gold_file=None, **params):
        table = rows() if table is None else table
        paths = Paths(report=tmp_path / "report", **({"gold": gold_file} if gold_file else {}))
        judge = judge or JudgeParams(kind="callable", function=f"audit_judges:{function}")
        write_rows(paths.rollouts, table)
        if gold is not None or not paths.gold.exists():
            write_rows(paths.gold, gold_rows() if gold is None else gold)
        write_verdicts(paths.verdicts, judged(judge, table) if given is None else given)
        stage = Stage("audit_judge", tracker=Silent(), report=paths.report)
        stage.section = lambda name, kind: {"verdicts": verdicts.Params(judge=judge)}[name]
        run(Params(**{"probes": 8, "gates": Gates(**{**OPEN, **(gates or {})}), **params}), paths, stage)
        return read(tmp_path / "report")

    return go


def judged(judge: JudgeParams, table: list[Row]) -> list[tuple[str, str, Reply]]:
    from tasks.judges import make_judge

    made = make_judge(judge, trained=None, source=Paths.source, where="verdicts.judge")
    asked = [question for row in table for question in first_questions(row, made, pairs_up_to=9)]
    return [(made.name, made.identity, made.read(asked[n], raw)) for n, raw in made.ask(asked)]


def read(report):
    metrics = json.loads((report / "metrics.json").read_text())
    return metrics, (report / "audit.md").read_text(), (report / "audit.html").read_text()


def said_by(name: str, table: list[Row], odds, **more) -> list[tuple[str, str, Reply]]:
    """A pairwise judge's table: odds(first text, second text) is the log-odds of the first; None: no valid reply."""
    found = []
    for row in table:
        for i in range(len(row.answers)):
            for j in range(len(row.answers)):
                if i != j:
                    texts = (row.answers[i].text, row.answers[j].text)
                    value = odds(*texts)
                    question = Question(row_id=row.id, prompt=row.prompt, answers=texts, places=(i, j))
                    values = None if value is None else (value, 0.0)
                    reply = Reply(question=question, values=values, prompt_tokens=200, completion_tokens=5, **more)
                    found.append((name, "", reply))
    return found


def prefers_good(first: str, second: str) -> float:
    return LOG3 * ((first.count(GOOD) > second.count(GOOD)) - (first.count(GOOD) < second.count(GOOD)))


# Gates


def test_every_measure_has_a_gate_and_every_gate_a_measure(audited):
    assert [spec.name for spec in fields(Gates)] == list(KINDS)
    metrics, *_ = audited()
    assert set(metrics["judge"]["measures"]) == set(KINDS) - {"panel_alpha"}


@pytest.mark.parametrize(
    ("low", "high", "limit", "at_most", "at_least"),
    [
        (0.2, 0.4, 0.5, "pass", "fail"),
        (0.6, 0.8, 0.5, "fail", "pass"),
        (0.4, 0.6, 0.5, "open", "open"),
        (0.2, 0.5, 0.5, "pass", "open"),
        (0.2, 0.4, None, "reported", "reported"),
    ],
)
def test_a_gate_fails_only_where_the_whole_interval_lies_beyond_it(low, high, limit, at_most, at_least):
    value = Estimate(mean=(low + high) / 2, low=low, high=high)
    assert Measure(name="flip_rate", value=value).status(limit) == at_most
    assert Measure(name="agreement", value=value).status(limit) == at_least


def test_a_family_passes_only_where_each_of_its_intervals_does():
    """The worst by its low end keeps the limit, and another, less certain one does not yet."""
    value = Estimate(mean=0.0, low=-0.01, high=0.01)
    assert Measure(name="injection", value=value, reach=0.01).status(0.02) == "pass"
    assert Measure(name="injection", value=value, reach=0.05).status(0.02) == "open"


def test_what_is_not_measured_fails_nothing_and_is_not_called_a_pass():
    missing = Measure(name="injection", why_not="nothing was asked")
    assert missing.status(0.01) == "not measured"
    assert answer([missing], {"injection": 0.01})[0] == "none"


# Judges with a known fault


def test_a_sound_judge_passes_what_it_is_held_to(audited):
    strict = {
        "agreement": 0.9,
        "injection": 0.3,
        "padding": 0.3,
        "null_wins": 0.3,
        "beats_empty": 0.7,
        "prefers_longer": 0.9,
    }
    metrics, page, _ = audited(gates=strict)
    measures = metrics["judge"]["measures"]
    assert measures["agreement"]["mean"] == 1.0 and measures["kappa"]["mean"] == 1.0
    assert all(shift["mean"] == 0 for shift in metrics["judge"]["injection"].values())
    assert metrics["gates_failed"] == 0 and "**Yes" in page
    assert measures["position_bias"] == {
        "status": "not measured",
        "why_not": "scores each answer by itself: there is no order",
    }


@pytest.mark.parametrize(
    ("function", "gate", "limit"),
    [
        ("inverted", "agreement", 0.7),
        ("longest", "prefers_longer", 0.75),
        ("longest", "padding", 0.02),
        ("silence", "null_wins", 0.2),
        ("silence", "beats_empty", 0.8),
        ("obedient", "injection", 0.01),
    ],
)
def test_a_fault_fails_its_gate_after_the_report_is_written(audited, tmp_path, function, gate, limit):
    with pytest.raises(UserError, match=rf"1 gate fails[\s\S]*audit_judges:{function}: {gate}") as told:
        audited(function, gates={gate: limit}, probes=16)
    assert KINDS[gate].mend in str(told.value) and "audit.html" in str(told.value)
    metrics, page, html = read(tmp_path / "report")
    assert metrics["gates_failed"] == 1 and metrics["judge"]["measures"][gate]["status"] == "fail"
    assert "**No: fails 1 of 1 gates**" in page and "No: fails 1 of 1 gates" in html


def test_without_limits_nothing_stops(audited):
    metrics, page, _ = audited("inverted")
    assert metrics["gates_failed"] == 0 and "**Not known" in page


# What is asked


def test_the_same_audit_twice_asks_once_and_leaves_the_same_bytes(audited, tmp_path, monkeypatch):
    files = lambda: {p.name: p.read_bytes() for p in sorted((tmp_path / "report").rglob("*")) if p.is_file()}
    audited()
    first = files()
    monkeypatch.setattr("rankwise.judges.CallableJudge.ask", lambda self, questions: pytest.fail(f"asked {questions}"))
    audited(given=[*_kept(tmp_path)])
    assert files() == first and {"audit.md", "audit.html", "metrics.json"} <= set(first)


def _kept(tmp_path):
    """The table of verdicts as it stands, as replies."""
    table = {row.id: row for row in read_rows(tmp_path / "data/rollouts.parquet")}
    for row_id, mine in read_verdicts(tmp_path / "data/verdicts.parquet").items():
        for one in mine:
            texts = tuple(table[row_id].answers[n].text for n in one.shown)
            question = Question(row_id=row_id, prompt=table[row_id].prompt, answers=texts, places=one.shown)
            yield one.judge, one.identity, Reply(question=question, values=one.values, raw=one.raw)


def test_no_rollouts_is_said_and_is_no_failure(audited, tmp_path):
    metrics, page, html = audited(table=[], given=[], gates={"agreement": 0.9})
    assert metrics == {"judges": 0, "gates_failed": 0}
    assert "Nothing was judged" in page and "Nothing was judged" in html
    write_verdicts(tmp_path / "people.parquet", said_by("ann", rows(), prefers_good))
    assert audited(table=[], given=[], gold_file=tmp_path / "people.parquet")[0] == metrics


def test_another_judge_than_the_one_that_labels_is_refused(audited):
    with pytest.raises(UserError, match=r"holds verdicts of gpt-4, and params.yaml names callable:audit_judges:sound"):
        audited(given=said_by("gpt-4", rows(), prefers_good))


def test_verdicts_on_rows_that_are_not_there_are_refused(audited):
    given = said_by("gpt-4", rows(17), prefers_good)
    with pytest.raises(UserError, match=r"'r16'.*no row has this id"):
        audited(given=given, probes=0)


def test_another_rubric_or_file_under_the_same_name_is_another_judge(audited):
    given = [(name, "before", reply) for name, _, reply in judged(JudgeParams(kind="callable", function=SOUND), rows())]
    with pytest.raises(UserError, match=r"callable:audit_judges:sound as it was, and it has changed since"):
        audited(given=given)


# Gold


def test_gold_of_other_prompts_under_the_same_ids_is_asked_about_and_not_joined(audited):
    """Ids are unique within one file; of 16 rollouts none is the gold row of its name."""
    gold = [replace(row, id=f"r{n:02}") for n, row in enumerate(gold_rows(16))]
    metrics, *_ = audited(gold=gold)
    found = metrics["judge"]["measures"]["agreement"]
    assert found["mean"] == 1.0 and found["of"] == "16 gold pairs"


def test_gold_on_the_rollouts_own_texts_is_met_in_any_order_and_not_asked_about_again(audited, monkeypatch):
    """Answers stand best first, as in preferences; half of the rows are of another file and are asked about."""
    ranked = lambda row: [replace(answer, rank=rank) for rank, answer in enumerate(row.answers[::-1])]
    known = [Row(id=f"other {row.id}", prompt=row.prompt, answers=tuple(ranked(row))) for row in rows()]
    asked = []
    really = judging.judge_rows
    told = lambda judge, rows, *a, what, **k: (
        (what == "gold rows" and asked.extend(rows)) or really(judge, rows, *a, what=what, **k)
    )
    monkeypatch.setattr("rankwise.judging.judge_rows", told)
    metrics, *_ = audited(gold=[*known, *gold_rows()])
    found = metrics["judge"]["measures"]["agreement"]
    assert found["mean"] == 1.0 and found["of"] == "88 gold pairs"  # 16 rows of 3 pairs, 40 of one
    assert {row.id for row in asked} == {row.id for row in gold_rows()}


def test_gold_may_be_a_file_and_each_annotator_in_it_votes(audited, tmp_path):
    """Two agree with the judge, one says tie: three votes a pair, not one pooled vote."""
    lines = [
        {"prompt": f"Film {n}:", "first": row.answers[2].text, "second": row.answers[0].text, "order": "none", **vote}
        for n, row in enumerate(rows())
        for vote in (
            {"annotator": "ann", "verdict": "A"},
            {"annotator": "bob", "verdict": "A"},
            {"annotator": "cid", "verdict": "tie"},
        )
    ]
    (tmp_path / "sheet.jsonl").write_text("\n".join(map(json.dumps, lines)))
    metrics, *_ = audited(gold_file=tmp_path / "sheet.jsonl")
    gold = metrics["judge"]["gold"]
    assert gold["three_ways"]["mean"] == pytest.approx(2 / 3) and gold["both_decide"]["mean"] == 1.0
    assert sum(map(sum, gold["confusion"])) == 3 * 16


def stored(tmp_path, lines) -> JudgeParams:
    """A judge whose replies are these lines of a file."""
    path = tmp_path / "data/source/people.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(map(json.dumps, lines)))
    return JudgeParams(kind="stored", verdicts=path.name)


def test_what_a_file_does_not_answer_is_no_invalid_reply(audited, tmp_path):
    """A judge of one pair in three; gold rows of five answers, which a file of pairs says nothing of, stop nothing."""
    lines = [
        {"prompt": f"Film {n}:", "first": row.answers[0].text, "second": row.answers[2].text, "order": "none",
         "verdict": "B"}
        for n, row in enumerate(rows())
    ]  # fmt: skip
    five = Row(
        id="five", prompt=text_prompt("Five:"), answers=tuple(Answer(text=f"answer {n}", rank=n) for n in range(5))
    )
    metrics, page, _ = audited(judge=stored(tmp_path, lines), gold=[five], gates={"invalid_share": 0.05})
    found = metrics["judge"]
    assert found["measures"]["invalid_share"]["mean"] == 0 and found["measures"]["invalid_share"]["of"] == "32 replies"
    assert (found["answered"], found["questions"]) == (32, 96) and "32 of 96" in page


def test_votes_without_an_order_show_no_effect_of_the_order(audited, tmp_path):
    """Two people, each pair written down by each in an order of their own."""
    lines = [
        {"prompt": f"Film {n}:", "first": row.answers[one].text, "second": row.answers[other].text, "order": "none",
         "annotator": who, "verdict": "A"}
        for n, row in enumerate(rows())
        for who, one, other in (("ann", 2, 0), ("bob", 0, 2))
    ]  # fmt: skip
    metrics, *_ = audited(judge=stored(tmp_path, lines))
    assert metrics["judge"]["measures"]["flip_rate"]["why_not"] == "one stored verdict stands for both orders of a pair"


# Probes without a reply


def test_an_attack_that_no_reply_could_be_read_of_is_on_the_page_and_passes_nothing():
    probes = battery(draw(rows(), 16))
    deaf = lambda probe: probe.name in ("forged_system_turn", "empty")
    outcomes = [
        Outcome(probe=probe, preference=0.0, win=0.5, twin_win=0.5 if probe.twin else None)
        for probe in probes
        if not deaf(probe)
    ]
    unread = [probe for probe in probes if deaf(probe)]
    found = audit(Material(name="deaf", outcomes=outcomes, unread_probes=unread), tie_below=0.0, price=(0.0, 0.0))
    measures = {measure.name: measure for measure in found.measures}
    assert measures["injection"].status(0.9) == "open" and "forged_system_turn" in measures["injection"].of
    assert measures["beats_empty"].why_not == "none of 16 probes had a valid reply"
    assert measures["padding"].status(0.9) == "pass"
    assert measures["invalid_share"].of_which == "probes"
    assert measures["invalid_share"].value.mean == len(unread) / len(probes)
    attacks = {line[0]: line[1:] for line in details(found)[0][3]}
    assert attacks["forged_system_turn"] == ("not measured", "16 of 16") and attacks["threat"][1] == "0 of 16"


# Tables made elsewhere


def test_a_stored_table_is_audited_without_asking_anybody(audited):
    """probes: 0; verdicts without probabilities in both orders, so position, flips and ties are there."""
    metrics, page, _ = audited(given=said_by("gpt-4", rows(), prefers_good), probes=0)
    measures = metrics["judge"]["measures"]
    assert metrics["judge"]["name"] == "gpt-4"
    assert measures["flip_rate"]["mean"] == 0 and measures["position_bias"]["mean"] == 0
    assert measures["injection"]["why_not"] == "audit_judge.probes is 0: nothing is asked"
    assert metrics["judge"]["cost"] == {
        "verdicts": 96, "calls": 96, "tokens_in_per_1000": 200000.0, "tokens_out_per_1000": 5000.0,
    }  # fmt: skip
    assert "gpt-4" in page


def test_a_judge_that_always_takes_the_first_fails_on_position(audited, tmp_path):
    with pytest.raises(UserError, match=r"position_bias(.|\n)*flip_rate"):
        audited(
            given=said_by("first", rows(), lambda a, b: LOG3), probes=0, gates={"position_bias": 0.1, "flip_rate": 0.3}
        )
    metrics, *_ = read(tmp_path / "report")
    assert metrics["judge"]["position_bias_nats"]["mean"] == pytest.approx(LOG3)
    assert metrics["judge"]["measures"]["tie_rate"]["mean"] == 1


def test_invalid_replies_are_counted_and_are_no_ties(audited):
    given = said_by("half", rows(), lambda a, b: None if a > b else prefers_good(a, b))
    metrics, *_ = audited(given=given, probes=0)
    measures = metrics["judge"]["measures"]
    assert measures["invalid_share"]["mean"] == 0.5
    assert measures["tie_rate"]["status"] == "not measured"  # of each pair one order alone is known


def test_gold_may_be_a_table_of_votes_and_each_vote_counts(audited, tmp_path):
    """Three people: two always agree with the judge, one always says tie. 2 of 3 votes agree; of decided ones all."""
    people = [vote for name in ("ann", "bob") for vote in said_by(name, rows(), prefers_good)]
    people += said_by("cid", rows(), lambda a, b: 0.0)
    write_verdicts(tmp_path / "data/prompts/labelled_test.parquet", people)
    metrics, *_ = audited(given=said_by("gpt-4", rows(), prefers_good), probes=0)
    gold = metrics["judge"]["gold"]
    assert gold["three_ways"]["mean"] == pytest.approx(2 / 3) and gold["both_decide"]["mean"] == 1.0
    assert sum(map(sum, gold["confusion"])) == 3 * 48


def test_a_panel_is_measured_by_its_members(audited, tmp_path):
    given = said_by("a", rows(), prefers_good) + said_by("b", rows(), lambda x, y: -prefers_good(x, y))
    metrics, page, _ = audited(given=given, probes=0)
    assert metrics["judges"] == 2 and metrics["panel"]["panel_alpha"]["mean"] < -0.9
    assert metrics["panel"]["two"][0]["agreement"]["mean"] == 0.0 and "The panel" in page
    with pytest.raises(UserError, match=r"the panel: panel_alpha"):
        audited(given=given, probes=0, gates={"panel_alpha": 0.4})
    metrics, page, html = read(tmp_path / "report")
    assert metrics["gates_failed"] == 1
    assert page.split("\n")[2] == "**No: the judges of the panel do not agree**"
    assert html.index("No: the judges") < html.index("Not known")


# Pages


def test_the_page_needs_no_other_file_and_shows_its_pictures(audited):
    _, _, html = audited(gates={"agreement": 0.7})
    assert html.count('src="data:image/png;base64,') == len(re.findall(r"<img", html)) >= 4
    assert "http://" not in html and "https://" not in html
    assert html.index("Yes, by its gates") < html.index("<table") < html.index("<img")


def test_what_a_name_says_is_text_in_both_pages(audited):
    name = 'x</td><script>alert("1")</script>|`*'
    _, page, html = audited(given=said_by(name, rows(), prefers_good), probes=0)
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    assert "<script>alert" not in page and r"\<script\>" in page


def test_prices_are_on_the_page_and_not_among_the_results(audited, monkeypatch):
    """A price is of the environment; results must not change with it."""
    monkeypatch.setenv("RANKWISE_JUDGE_PRICE_IN", "2.5")
    monkeypatch.setenv("RANKWISE_JUDGE_PRICE_OUT", "10")
    metrics, page, _ = audited()
    assert "price" not in json.dumps(metrics["judge"]["cost"]) and metrics["gates_failed"] == 0
    assert "price per 1,000 verdicts" in page


FIGURES = {
    "intervals": lambda path: plots.intervals(
        [{"name": "a", "mean": 0.1, "low": 0.05, "high": 0.2}, {"name": "b", "mean": 0.0, "low": 0.0, "high": 0.0}],
        path, title="t", unit="points", limit=0.01, at_most=True, even=0.0,
    ),
    "calibration": lambda path: plots.calibration([(0.6, 0.55, 10), (0.9, 0.7, 30)], path, title="t"),
    "orders": lambda path: plots.orders([(1.0, -0.5), (0.0, 0.0)], path, title="t"),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_pictures_are_the_same_bytes_for_the_same_numbers(name, tmp_path):
    FIGURES[name](tmp_path / "a.png")
    FIGURES[name](tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("low", "high", "limit", "at_most", "colour"),
    [
        (0.2, 0.3, 0.1, True, plots.ORANGE),
        (0.2, 0.3, 0.1, False, plots.BLUE),
        (0.0, 0.3, 0.1, True, plots.GREY),
        (0.0, 0.05, 0.1, False, plots.ORANGE),
        (0.0, 0.05, None, False, plots.BLUE),
    ],
)
def test_a_picture_colours_what_a_gate_decides(low, high, limit, at_most, colour):
    assert plots._side({"low": low, "high": high}, limit, at_most) == colour


def test_defaults_stop_no_judge_that_was_never_asked():
    limits = asdict(Gates())
    assert all(Measure(name=name, why_not="x").status(limits[name]) == "not measured" for name in KINDS)
    assert replace(Gates(), injection=0.01).injection == 0.01
