"""Laws of `python -m benchmarks.overhead`: what is counted as a layer's, and what is refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import overhead, scratch
from rankwise.types import UserError
from tasks import recipe

ROOT = Path(__file__).parent.parent


def cost(wall_s: float, cpu_s: float = 0.0) -> scratch.Cost:
    return scratch.Cost(wall_s=wall_s, cpu_s=cpu_s)


def a_round(bare: float, mlflow: float, dvc: float, prefect: float) -> dict:
    stage = {"bare": cost(bare, 1.0), "MLflow": cost(mlflow, 3.0), "DVC": cost(dvc, 4.5), "skipped by DVC": cost(0.5)}
    return {"dpo@1": {**stage, "Prefect": prefect}, "flow": {"whole": cost(30.0, 20.0), "skipped": [0.7], "rest": 9.0}}


def test_a_layer_adds_what_is_between_it_and_the_layer_before_it_in_the_same_round():
    """Rounds of 10 and of 20 seconds: differences of medians over all rounds would be the same, those of pairs are 1,
    2 and 0.5 whatever the machine's speed."""
    found = [a_round(base, base + 1.0, base + 3.0, base + 3.5) for base in (10.0, 20.0, 10.0)]
    one = overhead._of_stage("dpo@1", found)
    assert [one[f"wall {name}"]["samples"] for name in ("MLflow", "DVC", "Prefect", "all")] == [
        [1.0] * 3,
        [2.0] * 3,
        [0.5] * 3,
        [3.5] * 3,
    ]
    assert one["cpu MLflow"]["median"] == 2.0 and one["cpu DVC"]["median"] == 1.5 and "cpu Prefect" not in one


@pytest.mark.parametrize("seconds, met", [(4.9, True), (5.1, False)])
def test_a_dearer_frame_than_its_limit_is_told(seconds, met):
    found = [a_round(1.0, 1.0, 1.0, 1.0 + seconds)]
    options = overhead._options(["--steps", "100", "--step-ms", "50"])
    # 100 steps of 50 ms are 5 s: calls of 0.05 s are 1 % of them, a worker's 5 s on two cores would be 50 %.
    figures = overhead._figures([overhead._of_stage("dpo@1", found)], found, {"own_s": 0.05, "worker_s": 0.0}, options)
    (
        first,
        *_,
    ) = figures.values()
    assert first.met is met and first.value == pytest.approx(seconds)
    shares = [figure for name, figure in figures.items() if name.startswith("MLflow over 100 steps of 50 ms")]
    assert [(figure.value, figure.met) for figure in shares] == [(1.0, True)]


def test_a_stage_lasts_until_the_next_one_begins(monkeypatch):
    """What Prefect does between two tasks is a cost of the first."""
    at = lambda second: f"2026-01-01T00:00:{second:02d}Z"
    runs = [
        {"name": "earlier", "start_time": "2025-12-31T00:00:00Z", "end_time": "2025-12-31T00:00:01Z"},
        {"name": "dpo@1", "start_time": at(10), "end_time": at(14)},
        {"name": "sft", "start_time": at(1), "end_time": at(8)},
    ]
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(json.dumps(runs).encode()))
    since = overhead._seconds("2026-01-01T00:00:00Z")
    assert overhead._tasks("http://127.0.0.1:9/api", since=since) == {"sft": 9.0, "dpo@1": 4.0}


def test_the_recipe_of_the_copy_is_accepted(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(scratch.RECIPE))
    assert recipe.apply(tmp_path / "tiny.json", tmp_path / "params.yaml")


def test_the_tracker_gets_every_step_in_its_time():
    words = [sys.executable, "-c", overhead.STEPS, "20", "0.01"]
    told = json.loads(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert 0 < told["own_s"] < 0.2 and told["worker_s"] == 0  # RANKWISE_TRACKING=off, as in all tests


@pytest.mark.parametrize(
    "options, said", [(["--stages", "dop@1"], "dop@1"), (["--steps", "-1"], "--steps is 0 or more")]
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(options, said, monkeypatch):
    monkeypatch.setattr(overhead, "scratch_copy", lambda: pytest.fail("copied in spite of it"))
    with pytest.raises(UserError, match=said):
        overhead.main(options)
