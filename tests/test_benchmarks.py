"""Laws of the benchmarks: nothing is timed unless both sides do the same work, and what is told is what was seen."""

import contextlib
import importlib
import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import warm

from benchmarks import (
    cli,
    contest,
    loss_head,
    memory,
    parity,
    reference,
    report,
    rollouts,
    settings,
    train_step,
    workload,
)
from benchmarks.channel import Stop
from benchmarks.contest import Effort, Worker, WorkerFailed
from benchmarks.settings import EngineSetting, OurSetting, TrlSetting
from benchmarks.workload import EOS, FIRST, MODELS, Case
from rankwise.types import UserError

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "train_step": train_step,
    "reference": reference,
    "memory": memory,
    "rollouts": rollouts,
    "loss_head": loss_head,
}
SERVE = f"{sys.executable} {ROOT}/tests/model_server.py {{model}} {{port}}"
SMALL = Case(name="tiny", shape=MODELS["tiny"], batch=4, prompt=12, answer=8)
FP32 = OurSetting(precision="fp32", budget=64)


def run(name: str, *options: str, python: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """A command and its workers, which are forked (tests/warm.py) unless a Python is named."""
    return subprocess.run(
        [python or warm.folder() / "python", "-m", f"benchmarks.{name}", *options],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


# What both sides are given


def test_rows_are_a_function_of_the_seed():
    assert workload.rows(SMALL) == workload.rows(SMALL) != workload.rows(replace(SMALL, seed=1))
    for row in workload.rows(replace(SMALL, k=3)):
        assert len(row.answers) == 3 and all(answer[-1] == EOS for answer in row.answers)
        ids = [*row.prompt, *(i for answer in row.answers for i in answer[:-1])]
        assert all(FIRST <= i < SMALL.shape.vocabulary for i in ids)


def test_growth_adds_to_what_was_there():
    """So that a series over K or batch changes nothing else."""
    small = workload.rows(SMALL)
    more_answers, more_prompts = (workload.rows(SMALL.with_value(name, 8)) for name in ("k", "batch"))
    assert more_prompts[: len(small)] == small
    for few, many in zip(small, more_answers, strict=True):
        assert many.prompt == few.prompt and many.answers[:2] == few.answers


def test_every_row_fits_the_context_whatever_grows():
    for name, values in cli.GROWTH.items():
        case = Case().with_value(name, values[-1])
        longest = max(len(row.prompt) + max(map(len, row.answers)) for row in workload.rows(case))
        assert longest <= case.shape.context


def test_a_ranking_becomes_all_its_pairs_better_one_first():
    row = workload.rows(replace(SMALL, k=4))[0]
    pairs = [pair.answers for pair in workload.pairs(row)]
    assert len(pairs) == 6 and all(row.answers.index(a) < row.answers.index(b) for a, b in pairs)


def test_a_case_survives_the_way_to_its_worker():
    assert Case.of(json.loads(json.dumps(SMALL.spec()))) == SMALL


@pytest.mark.parametrize("text", ["bf16-4096", "fp32-64"])
def test_our_settings_are_read_as_they_are_written(text):
    assert str(settings.our_setting(text)) == text


@pytest.mark.parametrize("text", ["medium-compile-8", "bf16-eager-1-packed"])
def test_trl_settings_are_read_as_they_are_written(text):
    assert str(settings.trl_setting(text)) == text


@pytest.mark.parametrize(
    "engine, text", [("embedded", "bf16-128"), ("generate", "fp32-static-8"), ("server", "own-64")]
)
def test_engine_settings_are_read_as_they_are_written(engine, text):
    assert str(settings.engine_setting(engine, text)) == text
    with pytest.raises(UserError, match=f"no setting of {engine}"):
        settings.engine_setting(engine, f"{text}-8")


@pytest.mark.parametrize("text", ["fast", "bf16-4096-2", "fp32-lazy-2", "bf16-compile-x", "bf16-eager-0", ""])
def test_a_setting_that_is_none_is_refused_with_an_example(text):
    with pytest.raises(UserError, match="bf16-4096"):
        settings.our_setting(text)
    with pytest.raises(UserError, match="medium-compile-8"):
        settings.trl_setting(text)


def test_micro_batches_divide_the_step():
    """TRL averages over micro-batches unweighted, so an uneven last one would be another loss."""
    assert [settings.dividing(16, 8), settings.dividing(6, 4), settings.dividing(7, 4)] == [8, 3, 1]
    chosen = cli.Chosen(ours=FP32, trl=TrlSetting(precision="fp32", mode="eager", micro=16), trials=[])
    assert cli.fitted(chosen, replace(SMALL, batch=3, k=4)).trl.micro == 9  # 3 prompts × 6 pairs = 18


# Parity comes first


@pytest.fixture(scope="module")
def ours():
    from benchmarks import ours as module

    return module


@pytest.fixture(scope="module")
def our_step(ours):
    return ours.gradients(SMALL, FP32)


def test_both_sides_take_the_same_step(our_step, tmp_path):
    from benchmarks import theirs

    setting = TrlSetting(precision="fp32", mode="eager", micro=2)
    told = parity.check_step(*our_step, *theirs.gradients(SMALL, setting, str(tmp_path)))
    assert told["loss"] <= parity.LOSS and told["gradient"] <= parity.GRADIENT
    assert abs(our_step[0] - np.log(2)) > 1e-4  # policy and reference differ, so this is no empty case


def test_a_side_with_another_beta_is_not_timed(ours, our_step):
    with pytest.raises(UserError, match=r"nothing is timed.*loss differs.*gradient differs"):
        parity.check_step(*ours.gradients(SMALL, FP32, beta=0.2), *our_step)


def test_a_side_that_leaves_out_a_row_is_not_timed(ours, our_step):
    """Its gradient differs, whatever its loss."""
    with pytest.raises(UserError, match="gradient differs"):
        parity.check_step(our_step[0], ours.gradients(replace(SMALL, batch=3), FP32)[1], *our_step)


@pytest.mark.parametrize("broken", [np.array([1.0, np.nan]), np.array([1.0]), np.array([1.0, 2.0001])])
def test_values_that_are_missing_or_not_numbers_are_not_equal(broken):
    with pytest.raises(UserError, match="logps differs"):
        parity.check_logps(broken, np.array([1.0, 2.0]))
    with pytest.raises(UserError, match="gradient differs"):
        parity.check_step(0.7, broken, 0.7, np.array([1.0, 2.0]))


@pytest.mark.parametrize("name", ["train_step", "memory", "reference"])
def test_no_command_times_what_differs(name, monkeypatch):
    """The worker of one side is broken; no contest may begin."""
    broken = {"ours": (0.69, np.array([1.0, 2.0])), "trl": (0.70, np.array([1.0, 2.1]))}
    monkeypatch.setattr(parity, "_one", lambda case, what, side, **_: broken[side])
    monkeypatch.setattr(COMMANDS[name], "contest", lambda *_, **__: pytest.fail("timed in spite of it"))
    with pytest.raises(UserError, match="nothing is timed"):
        COMMANDS[name].main(["--quick", "--device", "cpu"])


# Rollouts


ROLLS = replace(SMALL, task="rollouts", k=2)  # ends: 16 of 128 tokens, 1 and 9 among them; 21 tokens at most


def test_tokens_are_those_of_answers_up_to_their_end():
    """3 + 1 + 21 + 2 tokens of two prompts with two answers each, their ends included; the third was cut."""
    assert {1, 9, 121} <= set(workload.end_ids(ROLLS)) and len(workload.end_ids(ROLLS)) == 128 // 8
    assert workload.longest_rollout(ROLLS) == 21
    assert workload.count_tokens([[[5, 6, 9], [1]], [[5] * 21, [7, 9]]], ROLLS) == 27


@pytest.mark.parametrize(
    "answer", [[], [5, 6], [5] * 22, [5] * 21 + [9], [5, 9, 0, 0], [9, 9]], ids=lambda answer: str(len(answer))
)
def test_an_answer_that_stops_early_or_late_is_not_counted(answer):
    """Padding, tokens after the end, work left undone: any would change the tokens a second."""
    with pytest.raises(ValueError, match="first end token"):
        workload.count_tokens([[answer, [5, 9]]], ROLLS)


def test_an_answer_too_few_is_not_counted():
    with pytest.raises(ValueError, match="of 2 each"):
        workload.count_tokens([[[5, 9]]], ROLLS)


@pytest.fixture(scope="module")
def samplers():
    from benchmarks import samplers as module

    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from benchmarks import models

    path = tmp_path_factory.mktemp("model")
    models.save(ROLLS, path)
    return str(path)


class Heard:
    """The clock's end of a worker's channel, in this process: so many gos, then none."""

    def __init__(self, gos: int = 0):
        self.gos, self.said = gos, []

    def say(self, **facts) -> None:
        self.said.append(facts)

    def wait(self) -> None:
        self.gos -= 1
        if self.gos < 0:
            raise Stop


def agreement(samplers, folder, *engines: str, serve: str = "") -> dict:
    heard = Heard()
    spec = {engine: parity._exact(engine, ROLLS).spec() for engine in engines}
    samplers.agree({"case": ROLLS.spec(), "folder": folder, "serve": serve, "settings": spec}, heard)
    return heard.said[0]


def test_all_engines_give_the_same_greedy_answers(samplers, folder):
    """And these depend on the context, or they would show little."""
    engines = ("embedded", "generate", "continuous", "server")
    told = agreement(samplers, folder, *engines, serve=SERVE)
    assert told["left_out"] == {} and told["equal"] == dict.fromkeys(engines, 1.0)
    assert set(parity.check_greedy(told["margins"])["limits"]) == set(engines)
    with samplers.ENGINES["generate"](task(samplers, folder, "generate")) as answer:
        assert len({tuple(mine[0]) for mine in answer([row.prompt for row in workload.rows(ROLLS)], 0)}) == ROLLS.batch


def task(samplers, folder, engine, **changes):
    return samplers.Task(case=ROLLS, folder=folder, setting=parity._exact(engine, ROLLS), **{"greedy": True, **changes})


@pytest.mark.parametrize("wrong", ["last token lost", "first token lost", "not greedy"])
def test_an_engine_that_answers_something_else_is_not_timed(wrong, samplers, folder, monkeypatch):
    right = samplers.ENGINES["generate"]
    cut = {"last token lost": slice(-1), "first token lost": slice(1, None)}.get(wrong, slice(None))

    @contextlib.contextmanager
    def broken(task):
        with right(replace(task, greedy=wrong != "not greedy")) as answer:
            yield lambda prompts, number: answer([prompt[cut] for prompt in prompts], number)

    monkeypatch.setitem(samplers.ENGINES, "embedded", broken)
    told = agreement(samplers, folder, "embedded", "generate")
    assert told["equal"]["embedded"] < 1
    with pytest.raises(UserError, match=r"nothing is timed: a greedy token of embedded is .* --engines leaves it out"):
        parity.check_greedy(told["margins"])


def test_a_margin_that_is_no_number_is_none():
    with pytest.raises(UserError, match="nan nats"):
        parity.check_greedy({"embedded": float("nan")})
    with pytest.raises(UserError, match="greedy token of generate"):
        parity.check_greedy({"generate": 0.1, "server": 0.1})  # a server may round as bf16 does


def test_an_engine_that_cannot_run_is_left_out_and_says_why(samplers, folder, monkeypatch):
    def broken(task):
        raise ImportError("no flash here")

    monkeypatch.setitem(samplers.ENGINES, "continuous", broken)
    told = agreement(samplers, folder, "generate", "continuous")
    assert told["left_out"] == {"continuous": "does not run here (ImportError: no flash here)"}
    assert set(told["margins"]) == {"generate"}
    monkeypatch.setitem(samplers.ENGINES, "generate", broken)
    with pytest.raises(ImportError):
        agreement(samplers, folder, "generate")


def test_no_rollouts_are_timed_by_an_engine_that_differs(monkeypatch):
    class Told(Heard):
        def __init__(self, **spec):
            super().__init__()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def hear(self):
            return {"margins": {"embedded": 0.2, "generate": 0.0}, "equal": {}, "left_out": {}}

    monkeypatch.setattr(rollouts, "Worker", Told)
    monkeypatch.setattr(rollouts, "contest", lambda *_, **__: pytest.fail("timed in spite of it"))
    with pytest.raises(UserError, match="nothing is timed"):
        rollouts.main(["--quick", "--device", "cpu"])


@pytest.mark.parametrize("engine, precision", [("embedded", "bf16"), ("generate", "bf16"), ("continuous", "fp32")])
def test_a_pass_tells_what_it_sampled(engine, precision, samplers, folder):
    heard = Heard(gos=3)
    cache = "dynamic" if engine == "generate" else ""
    setting = EngineSetting(precision=precision, batch=4, cache=cache)
    spec = {"side": engine, "case": ROLLS.spec(), "folder": folder, "setting": setting.spec()}
    with pytest.raises(Stop):
        samplers.run(spec, heard)
    _, *passes = heard.said
    assert len(passes) == 3 and all(one["answers"] == 8 and one["seconds"] > 0 for one in passes)
    assert all(8 <= one["tokens"] <= 8 * 21 for one in passes)
    assert len({one["tokens"] for one in passes}) > 1  # other answers every time


@pytest.mark.slow
def test_every_engine_is_timed_side_by_side(tmp_path):
    file = tmp_path / "record.json"
    told = run("rollouts", "--quick", "--device", "cpu", "--serve", SERVE, "--json", str(file))
    assert told.returncode == 0, told.stderr
    record = json.loads(file.read_text())
    engines = ["embedded", "generate", "continuous", "server"]
    (result,) = record["results"]
    assert list(result["engines"]) == engines and record["left_out"] == {}
    assert result["order"] == [*engines, *engines[::-1], *engines]
    assert all(record["parity"][engine] <= record["parity"]["limits"][engine] for engine in engines)
    assert record["parity"]["equal_to_generate"]["embedded"] == 1
    for one in result["engines"].values():
        check_side(one)
        rates = [tokens / seconds for tokens, seconds in zip(one["tokens"], one["samples"], strict=True)]
        assert one["tokens_per_second"]["samples"] == pytest.approx(rates)
        generate = result["engines"]["generate"]["tokens_per_second"]["median"]
        assert one["ratio"] == pytest.approx(one["tokens_per_second"]["median"] / generate)
        assert one["answers"] == [16] * 3 and one["peak"]["median"] > 0
    assert result["settings"] == {**rollouts.QUICK} and record["trials"] == []
    assert record["options"]["serve"] == SERVE and str(tmp_path) not in told.stdout


# How it is measured


def test_sides_alternate_and_neither_is_always_second():
    rounds = list(contest.alternation(["ours", "trl"], 4))
    assert rounds == [["ours", "trl"], ["trl", "ours"], ["ours", "trl"], ["trl", "ours"]]


def test_the_ratio_is_the_quotient_of_the_medians():
    over, under = contest.summary([4.0, 2.0, 9.0]), contest.summary([1.0, 0.5, 40.0])
    assert (over["median"], under["median"]) == (4.0, 1.0) and contest.quotient(over, under) == 4.0
    assert over["quartiles"] == [3.0, 6.5]  # half way between 2 and 4, and between 4 and 9
    assert contest.quotient(None, under) is None and contest.quotient(contest.summary([]), under) is None


@pytest.mark.parametrize("exclusive", [False, True])
def test_every_round_has_each_side_once(exclusive):
    """Two workers of the same kind stand for the sides."""
    head = {"tokens": 8, "vocabulary": 16, "hidden": 4, "dtype": "fp32", "device": "cpu", "seed": 0}
    start = partial(Worker, job="head", head="ours", **head)
    effort = Effort(rounds=3, warmup=1, exclusive=exclusive)
    found, order = contest.contest({"a": start, "b": start}, effort, what="test")
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert all(len(one.seconds) == 3 and min(one.seconds) > 0 for one in found.values())


def test_a_worker_that_fails_says_why():
    told = pytest.raises(WorkerFailed, match="unexpected keyword argument 'nonsense'")
    with Worker(job="steps", side="ours", case=SMALL.spec(), setting={"nonsense": 1}) as worker, told:
        worker.hear()


def test_like_for_like_compares_equal_precisions():
    chosen = cli.Chosen(
        ours=OurSetting(precision="bf16", budget=4096),
        trl=TrlSetting(precision="medium", mode="compile", micro=4),
        trials=[],
    )
    pairs = train_step.comparisons(SMALL, chosen, like_for_like=True)
    assert {name: pair.spec() for name, pair in pairs.items()} == {
        "best": {"ours": "bf16-4096", "trl": "medium-compile-4"},
        "fp32": {"ours": "fp32-4096", "trl": "fp32-compile-4"},
        "bf16": {"ours": "bf16-4096", "trl": "bf16-compile-4"},
    }


# Commands


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers_without_heavy_imports(name):
    probe = (
        f"import sys, runpy; sys.argv = ['{name}', '--help']\n"
        f"try: runpy.run_module('benchmarks.{name}', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    told = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    assert f"python -m benchmarks.{name}" in told.stdout and "--json" in told.stdout


def test_a_mistake_is_a_message_and_status_2():
    told = run("train_step", "--quick", "--device", "cpu", "--values", "3")
    assert told.returncode == 2 and "--vary" in told.stderr and "Traceback" not in told.stderr


@pytest.mark.parametrize(
    "options, words",
    [
        (("--k", "1"), "--k 1"),
        (("--task", "sft", "--vary", "k"), "--vary k"),
        (("--values", "3"), "--values"),
        (("--vary", "k", "--values", "4", "1"), "--values 1: a preference needs two answers"),
        (("--device", "cuda"), "--device cuda: torch finds no CUDA device"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(options, words, monkeypatch):
    monkeypatch.setattr(contest.subprocess, "Popen", lambda *_, **__: pytest.fail("a worker was started"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=words):
        train_step.main(["--quick", "--device", "cpu", *options])


@pytest.mark.parametrize("name, more", [("loss_head", ["--ours-only"]), ("attention", []), ("rollouts", [])])
def test_a_device_that_is_not_there_is_refused_by_every_command(name, more, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda"):
        importlib.import_module(f"benchmarks.{name}").main(["--quick", *more, "--device", "cuda"])


@pytest.mark.parametrize(
    "options, words",
    [
        (("--engines", "server"), "add --serve"),
        (("--serve", SERVE, "--engines", "embedded"), "--engines names none"),
        (("--settings", "vllm=own-8"), "no such engine"),
        (("--settings", "generate=bf16-8"), "bf16-dynamic-32"),
        (("--settings", "server=own-8"), "takes no part"),
        (("--values", "3"), "--values"),
    ],
)
def test_rollouts_that_cannot_be_measured_are_refused_before_anything_runs(options, words, monkeypatch):
    monkeypatch.setattr(contest.subprocess, "Popen", lambda *_, **__: pytest.fail("a worker was started"))
    with pytest.raises(UserError, match=words):
        rollouts.main(["--quick", "--device", "cpu", *options])


@pytest.mark.parametrize(
    "option, value, words",
    [
        ("--json", "{folder}/missing/record.json", "cannot be written"),
        ("--json", "{folder}", "cannot be written"),
        ("--our-setting", "foo", "'foo' is no setting"),
        ("--trl-setting", "foo", "'foo' is no setting"),
    ],
)
def test_an_option_that_cannot_be_read_is_named_once(option, value, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train_step.main([option, value.format(folder=tmp_path)])
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and words in said and said.count(option) == 1


def test_the_package_says_what_can_be_asked(capsys):
    runpy.run_module("benchmarks", run_name="__main__")
    said = capsys.readouterr().out
    assert all(f"python -m benchmarks.{name}" in said for name in (*COMMANDS, "attention"))


def test_the_settings_told_are_those_that_ran():
    """Once where all results had the same, else at each case."""
    result = lambda trl, **changes: {
        "case": replace(SMALL, **changes).spec(),
        "compared": "best",
        "settings": {"ours": "fp32-64", "trl": trl},
    }
    alike, fitted = [result("fp32-eager-4")] * 2, [result("fp32-eager-4"), result("fp32-eager-3", batch=3)]
    assert report._settings(alike) == [("settings", "ours fp32-64, trl fp32-eager-4")]
    assert [setting for _, setting in report._settings(fitted)] == [
        "ours fp32-64, trl fp32-eager-4",
        "ours fp32-64, trl fp32-eager-3",
    ]
    assert report._settings([{"case": {}}]) == []


def test_ours_needs_neither_trl_nor_datasets():
    probe = (
        "import sys; sys.modules.update(dict.fromkeys(('trl', 'datasets', 'prefect', 'mlflow', 'dvc', 'openai')))\n"
        "import benchmarks.jobs, benchmarks.ours, benchmarks.heads, benchmarks.train_step, benchmarks.samplers"
    )
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT, timeout=120).returncode == 0


def test_the_record_on_stdout_is_json_and_nothing_else():
    told = run("train_step", "--quick", "--ours-only", "--device", "cpu", "--k", "3", "--json")
    assert told.returncode == 0, told.stderr
    record = json.loads(told.stdout)
    (result,) = record["results"]
    check_side(result["ours"])
    assert record["options"]["k"] == [3] and record["options"]["ours_only"]
    assert record["parity"] is None and result["ratio"] is None and result["case"]["k"] == 3
    assert result["step_flops"] > 0 and result["ours"]["mfu"] > 0
    assert {"device", "cores", "threads", "versions", "matmul_flops"} <= set(record["machine"])
    assert str(ROOT) not in told.stdout


def check_side(side: dict) -> None:
    assert side["median"] == np.median(side["samples"]) and len(side["samples"]) == 3
    assert side["quartiles"][0] <= side["median"] <= side["quartiles"][1]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "sft"])
def test_a_step_is_timed_on_both_sides(task, tmp_path):
    file = tmp_path / "record.json"
    fewer = ["--best-only"] if task == "sft" else []  # a side's start is seconds of imports
    told = run("train_step", "--quick", "--device", "cpu", "--task", task, *fewer, "--json", str(file))
    assert told.returncode == 0, told.stderr
    record = json.loads(file.read_text())
    compared = [(result["case"]["k"], result["compared"]) for result in record["results"]]
    assert compared == ([(2, "best"), (2, "bf16"), (4, "best")] if task == "dpo" else [(1, "best")])
    for result in record["results"]:
        check_side(result["ours"])
        check_side(result["trl"])
        assert result["ratio"] == pytest.approx(result["trl"]["median"] / result["ours"]["median"])
        assert result["order"] == ["ours", "trl", "trl", "ours", "ours", "trl"]
    assert record["parity"]["loss"] <= record["parity"]["limits"]["loss"]
    assert record["chosen"] == record["results"][0]["settings"] == {"ours": "fp32-4096", "trl": "fp32-eager-2"}


@pytest.mark.slow
def test_a_second_reference_pass_recomputes_nothing(tmp_path):
    file = tmp_path / "record.json"
    told = run("reference", "--quick", "--device", "cpu", "--json", str(file))
    assert told.returncode == 0, told.stderr
    (result,) = json.loads(file.read_text())["results"]
    assert result["rows_recomputed"] == 0
    assert result["ratio"] == pytest.approx(result["trl"]["median"] / result["ours"]["median"])


@pytest.mark.slow
def test_memory_is_counted_above_what_imports_take(tmp_path):
    file = tmp_path / "record.json"
    told = run("memory", "--quick", "--rounds", "1", "--device", "cpu", "--json", str(file), python=sys.executable)
    assert told.returncode == 0, told.stderr
    (result,) = json.loads(file.read_text())["results"]
    for side in (result["ours"], result["trl"]):
        assert 0 < side["above_imports"]["median"] < side["total"]["median"]
    ours, trl = result["ours"]["above_imports"], result["trl"]["above_imports"]
    assert result["ratio"] == pytest.approx(ours["median"] / trl["median"])


def test_peak_memory_is_that_of_the_work():
    """A head over 2,000 × 4,000 words in fp32 keeps at least the gradient of its weight, and no more than it must."""
    spec = {"tokens": 2_000, "vocabulary": 4_000, "hidden": 256, "dtype": "fp32", "device": "cpu", "seed": 0}
    found, _ = contest.contest(
        {name: partial(Worker, job="head", head=name, **spec) for name in ("full",)},
        Effort(rounds=1, warmup=1),
        what="test",
    )
    logits = 2_000 * 4_000 * 4
    assert 2 * logits < found["full"].above_baseline[0] < 12 * logits


def test_errors_of_a_head_are_against_float64():
    """The exact head in float32 errs by about float32's rounding; in bf16 by about bf16's."""
    from benchmarks import heads

    spec = {"tokens": 16, "vocabulary": 64, "hidden": 64, "device": "cpu", "seed": 0}
    errors = {}
    for dtype in ("fp32", "bf16"):
        given = heads.inputs({**spec, "dtype": dtype})
        errors[dtype] = heads.errors_of(heads.HEADS["ours"](), *given)
    assert errors["fp32"]["logp_error"] < 1e-5 < errors["bf16"]["logp_error"] < 0.1
    assert errors["fp32"]["weight_gradient_error"] < 1e-5 < errors["bf16"]["weight_gradient_error"] < 0.05


def test_heads_are_tried_on_tokens_that_the_model_is_sure_of():
    """Every second target from hardly to nearly certain, the others by chance; rounding must cancel there too."""
    from benchmarks import heads

    spec = {"tokens": 256, "vocabulary": 2_000, "hidden": 288, "device": "cpu", "seed": 0}
    hidden_NH, weight_VH, target_N = heads.inputs({**spec, "dtype": "fp32"})
    p_N = heads.HEADS["full"]()(hidden_NH, weight_VH, target_N).exp()
    sure, others = p_N[heads.CONFIDENT], p_N[::2]
    assert sure[:8].max() < 0.1 and 0.9999 < sure[-8:].median() < 1 - 1e-6 and others.median() < 0.01
    hidden_NH, weight_VH, target_N = heads.inputs({**spec, "dtype": "bf16"})
    logp_N = heads.HEADS["ours"]()(hidden_NH, weight_VH, target_N)
    assert logp_N.max() <= 0
