"""Laws of sweeps: what a sweep file says becomes points, and points become one figure."""

from __future__ import annotations

import json
import math
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from clones import Repository

from rankwise.evaluation import Estimate
from rankwise.types import UserError
from tasks import frontier, recipe, sweep
from tasks.frontier import Setting, at_equal_kl, in_short, settings
from tasks.stage import Stage
from tasks.tracking import Tracker

ROOT = Path(__file__).parent.parent
SWEEP = {
    "name": "small",
    "seeds": [0, 1],
    "data": {"pairs": {"select": {"answers": 2}}, "rankings": {}},
    "over": {"dpo": {"length_normalised": False}, "evaluate": {"against_data": True}},
    "methods": {
        "dpo": {"label": "DPO", "data": "pairs", "vary": {"dpo.beta": [0.1, 1.0]}},
        "pl": {"data": "rankings", "over": {"dpo": {"loss": "pairwise"}}, "vary": {"dpo.beta": [0.3]}},
        "best": {"vary": {"evaluate.best_of": [2]}},
    },
    "temperatures": {"values": [0.5, 1.0], "of": {"dpo": 0.1}},
}


@pytest.fixture
def apply(tmp_path):
    def apply(**changed) -> dict:
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**SWEEP, **changed}))
        return sweep.apply(tmp_path / "sweep.yaml", file=tmp_path / "params.yaml", params=ROOT / "params.yaml")

    return apply


def test_every_value_and_seed_of_a_method_is_a_policy_and_an_evaluation(apply):
    found = apply()
    assert list(found["policies"]) == ["dpo-0_1-0", "dpo-0_1-1", "dpo-1-0", "dpo-1-1", "pl-0_3-0", "pl-0_3-1"]
    assert found["policies"]["pl-0_3-1"]["dpo"] == {
        "length_normalised": False,
        "loss": "pairwise",
        "beta": 0.3,
        "seed": 1,
    }
    for key in found["policies"]:
        assert found["evaluations"][key]["policy"] == f"sweeps/small/policies/{key}"


def test_a_method_that_trains_nothing_evaluates_the_sft_model(apply):
    found = apply()
    assert "best-2-0" not in found["policies"]
    assert found["evaluations"]["best-2-0"]["policy"] == "models/sft"
    assert found["evaluations"]["best-2-0"]["evaluate"]["best_of"] == 2


def test_the_sft_model_is_a_point_itself_at_each_temperature(apply):
    found = apply()
    assert [key for key in found["evaluations"] if key.startswith("sft")] == [
        "sft-0",
        "sft-0-t0_5",
        "sft-1",
        "sft-1-t0_5",
    ]
    assert found["evaluations"]["dpo-0_1-1-t0_5"]["evaluate"]["temperature"] == 0.5
    assert not any(key.startswith("dpo-1-") and "-t" in key for key in found["evaluations"])


def test_answers_are_not_drawn_with_the_seed_of_the_rollouts(apply):
    """Stage rollouts has seed 0, and a point would be evaluated on what it was trained on."""
    assert {point["evaluate"]["seed"] for point in apply()["evaluations"].values()} == {1, 2}


def test_no_name_holds_a_dot(apply):
    """DVC takes it for a level."""
    found = apply()
    assert not any("." in key for kind in sweep.KINDS for key in found[kind])


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"methods": {"a": {"data": "rankings", "vary": {"dpo.bta": [0.1]}}}}, "did you mean 'beta'"),
        (
            {"methods": {"a": {"data": "rankings", "vary": {"dpoo.beta": [0.1]}}}},
            "parameters of 'dpoo', and its points run dpo and",
        ),
        ({"methods": {"a": {"data": "ranking", "vary": {"dpo.beta": [0.1]}}}}, "none of the sweep's (pairs, rankings)"),
        ({"methods": {"a": {"data": "pairs", "reward": "judge", "vary": {"dpo.beta": [0.1]}}}}, "name one of them"),
        ({"methods": {"a": {"data": "pairs", "vary": {"dpo.beta": [-1.0]}}}}, "greater than 0"),
        ({"methods": {"a": {"data": "pairs", "vary": {"dpo.beta": [0.1], "dpo.epochs": [1]}}}}, "one parameter"),
        ({"temperatures": {"values": [0.5], "of": {"dpo": 0.2}}}, "0.2 is no value of that method's knob"),
        ({"seeds": []}, "seeds is missing or empty"),
        ({"rewards": {"fitted": "pears"}}, "'pears' is none of the sweep's data"),
        ({"metods": {}}, "did you mean 'methods'"),
        ({"methods": {"sft": {"data": "pairs"}}}, "'sft' cannot be a name"),
        ({"methods": {"a.b": {"data": "pairs"}}}, "'a.b' cannot be a name"),
        ({"name": "../models"}, "'../models' cannot be a name"),
        ({"seeds": [0, 0]}, "one stands twice"),
        ({"methods": {"a": {"vary": {"evaluate.best_of": [1]}}, "a-1": {}}}, "two points would be called 'a-1-0'"),
        ({"methods": {"a": {"data": "pairs", "vary": {"dpo.beta": [0.12345671, 0.12345672]}}}}, "two points would be"),
        ({"methods": {"a": {"data": "pairs"}, "b": {"data": "pairs"}}}, "a-0 and b-0 would train the same policy"),
        ({"over": {"dpo": {"seed": 9}}}, "seeds are those of the sweep"),
        ({"over": {"evaluate": {"temperature": 0.5}}}, "others are told by temperatures"),
        ({"needs": {"rollouts": {"k": 8}}}, "rollouts.k is 4"),
    ],
)
def test_a_mistake_in_a_sweep_file_is_named_and_changes_nothing(apply, tmp_path, changed, said):
    apply()
    before = (tmp_path / "params.yaml").read_bytes()
    with pytest.raises(UserError) as raised:
        apply(**{"temperatures": {}, **changed})
    assert said in str(raised.value)
    assert (tmp_path / "params.yaml").read_bytes() == before


RECIPES = {"frontier": None, "ranking": "pl-dpo-8", "imdb": "imdb"}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes/sweeps").glob("*.yaml")))
def test_the_shipped_sweeps_are_sound_over_the_recipes_that_they_name(name, tmp_path):
    recipe.apply(ROOT / f"recipes/{RECIPES[name]}.yaml" if RECIPES[name] else None, tmp_path / "own.yaml")
    file = ROOT / f"recipes/sweeps/{name}.yaml"
    found = sweep.apply(file, file=tmp_path / "params.yaml", params=tmp_path / "own.yaml")
    assert len({point["method"] for point in found["evaluations"].values()}) > 3


def test_the_shipped_graph_has_no_point():
    shipped = yaml.safe_load((ROOT / "sweeps/params.yaml").read_text())
    assert not any(shipped[kind] for kind in sweep.KINDS)


# The figure


def metrics(kl: float, reward: float) -> dict:
    around = lambda value, half: {"mean": value, "low": value - half, "high": value + half}
    return {"kl": around(kl, 0.5), "gold_reward": {"policy": around(reward, 0.1)}, "length": {"policy": 30.0}}


def test_seeds_of_a_setting_become_one_row_and_a_missing_point_is_named(apply, tmp_path):
    document = apply()
    for number, key in enumerate(document["evaluations"]):
        if key != "best-2-1":
            (tmp_path / key).mkdir()
            (tmp_path / key / "metrics.json").write_text(json.dumps(metrics(kl=number, reward=0.2)))
    found, missing = settings(document, tmp_path)
    assert missing == ["best-2-1"]
    [setting] = [one for one in found if one.method == "dpo" and one.value == 0.1 and one.temperature == 1.0]
    first, second = (list(document["evaluations"]).index(f"dpo-0_1-{seed}") for seed in (0, 1))
    assert setting.seeds == 2 and setting.found["kl"].mean == (first + second) / 2
    assert setting.found["words"] == Estimate(mean=30.0, low=30.0, high=30.0)
    assert "win_rate_gold" not in setting.found, "what no evaluation holds is left out"


def point(method: str, kl: float, reward: float) -> Setting:
    exact = lambda value: Estimate(mean=value, low=value - 0.1, high=value + 0.1)
    return Setting(
        method=method, value=kl, temperature=1.0, seeds=1, found={"kl": exact(kl), "gold_reward": exact(reward)}
    )


def test_curves_are_compared_where_they_have_spent_the_same_kl():
    """A reward that is 1 + √KL is met exactly; nothing is said beyond 9 nats, nor below half of the first point, 2."""
    curve = [point("a", kl, 1 + math.sqrt(kl)) for kl in (9, 2)]
    found = at_equal_kl([*curve, point("sft", 0, 1), point("b", 1, 1)], "gold_reward")
    assert {kl: one.mean for kl, one in found["a"].items()} == pytest.approx(
        {kl: 1 + math.sqrt(kl) for kl in (1, 2, 4, 8)}
    )
    assert found["a"][1].low == pytest.approx(1.9)
    assert set(found["b"]) == {0.5, 1}


def test_between_far_points_nothing_is_said():
    """From 1 to 50 nats: 8 nats are more than twice the one and less than half of the other."""
    found = at_equal_kl([point("sft", 0, 1), point("a", 1, 2), point("a", 50, 9)], "gold_reward")
    assert set(found["a"]) == {0.5, 1, 2}


def test_diversity_is_told_relative_to_the_reference_that_was_cut_alike(apply, tmp_path):
    document = apply()
    (tmp_path / "dpo-1-0").mkdir()
    report = {**metrics(kl=1, reward=0.2), "distinct_2": {"policy": 0.3, "reference": 0.6}}
    (tmp_path / "dpo-1-0/metrics.json").write_text(json.dumps(report))
    [one] = settings(document, tmp_path)[0]
    assert one.found["distinct_2"].mean == 0.5


def test_the_end_table_fits_a_terminal(apply, tmp_path):
    document = apply()
    for number, key in enumerate(document["evaluations"]):
        (tmp_path / key).mkdir()
        (tmp_path / key / "metrics.json").write_text(json.dumps(metrics(kl=number, reward=-0.234567)))
    shown = in_short(document, settings(document, tmp_path)[0], "gold_reward")
    assert max(map(len, shown.splitlines())) <= 80 and "DPO" in shown and "beta 0.1" in shown


def test_without_a_scorer_the_figure_says_what_is_missing(apply, tmp_path):
    document = apply()
    (tmp_path / "dpo-1-0").mkdir()
    (tmp_path / "dpo-1-0/metrics.json").write_text(json.dumps({"kl": {"mean": 1, "low": 1, "high": 1}}))
    paths = frontier.Paths(sweep=tmp_path / "params.yaml", evaluations=tmp_path, report=tmp_path / "report")
    with pytest.raises(UserError, match="no score at all"):
        frontier.run(frontier.Params(), paths, Stage("frontier", tracker=Tracker(), report=paths.report))
    assert document["figures"] == {"small": {}}


# Through DVC and Prefect


@pytest.fixture(scope="module")
def swept(api, tmp_path_factory) -> tuple[Repository, str]:
    """A tiny pipeline and a sweep over it, two points at a time, from nothing."""
    made = Repository(tmp_path_factory.mktemp("sweep") / "clone")
    (made.root / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    return made, made.command("python", "-m", "flows.frontier", "sweep.yaml", "--jobs", "2", PREFECT_API_URL=api)


@pytest.mark.slow
def test_a_sweep_runs_from_nothing_to_its_figure(swept):
    repository, said = swept
    report = repository.root / "sweeps/small/frontier"
    assert {path.name for path in (report / "plots").iterdir()} == {"frontier.png", "temperatures.png"}
    table = (report / "frontier.md").read_text()
    assert "| DPO | dpo.beta | 0.1 | 2 |" in table and "DPO" in said
    assert (report / "points.csv").read_text().count("\n") == 1 + 7, (
        "SFT twice, three betas, one of them twice, best of 2"
    )
    assert json.loads((report / "metrics.json").read_text())["missing"] == 0


@pytest.mark.slow
def test_stopped_in_the_middle_no_point_goes_on_alone_and_the_same_command_continues(api, tmp_path):
    made = Repository(tmp_path / "clone")
    made.command("dvc", "repro", "reference_logprobs@1", "audit_judge@1")
    made.warm = False  # points that are stopped are processes of their own
    (made.root / "sweep.yaml").write_text(yaml.safe_dump({**SWEEP, "seeds": [0], "temperatures": {}}))
    command = ["python", "-m", "flows.frontier", "sweep.yaml", "--jobs", "2"]
    flow = subprocess.Popen(
        command,
        cwd=made.root,
        env={**made.environment(), "PREFECT_API_URL": api},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in flow.stdout:
        if "> exec python -m tasks.dpo --over" in line:
            break
    flow.send_signal(signal.SIGTERM)
    rest, _ = flow.communicate(timeout=120)
    assert flow.returncode == 143 and "Continue with: python -m flows.frontier sweep.yaml --jobs 2" in rest
    alive = [path for path in Path("/proc").glob("[0-9]*") if points_run_in(path, made.root)]
    assert alive == []
    made.warm = True
    said = made.command(*command, PREFECT_API_URL=api)
    assert "failed" not in said and (made.root / "sweeps/small/frontier/plots/frontier.png").exists()


def points_run_in(process: Path, root: Path) -> bool:
    try:
        return b"sweeps/" in (process / "cmdline").read_bytes() and (process / "cwd").resolve() == root.resolve()
    except OSError:
        return False


@pytest.mark.slow
def test_the_pipelines_own_repro_does_not_run_the_sweep(swept):
    repository, _ = swept
    ran = repository.ran(repository.command("dvc", "repro"))
    assert ran and not any("sweeps" in stage for stage in ran), "dpo, evaluate and register of the pipeline itself"


@pytest.mark.slow
def test_one_more_value_costs_its_own_points(api, swept):
    repository, _ = swept
    methods = {**SWEEP["methods"], "pl": {**SWEEP["methods"]["pl"], "vary": {"dpo.beta": [0.3, 0.6]}}}
    (repository.root / "sweep.yaml").write_text(yaml.safe_dump({**SWEEP, "methods": methods}))
    said = repository.command("python", "-m", "flows.frontier", "sweep.yaml", PREFECT_API_URL=api)
    assert " 5 ran" in said, "two policies, two evaluations, the figure"
    assert "every stage is up to date" in repository.command("python", "-m", "flows.frontier", "sweep.yaml")


@pytest.mark.slow
def test_a_point_that_fails_stops_what_follows_from_it_and_nothing_else(api, swept):
    """At a rate of 1e38 pl's policy is no number; what it was evaluated as before is not drawn in its place."""
    repository, _ = swept
    broken = {**SWEEP["methods"]["pl"], "over": {"dpo": {"learning_rate": 1e38}}}
    (repository.root / "sweep.yaml").write_text(
        yaml.safe_dump({**SWEEP, "seeds": [0], "methods": {**SWEEP["methods"], "pl": broken}})
    )
    done = subprocess.run(
        ["python", "-m", "flows.frontier", "sweep.yaml"],
        cwd=repository.root,
        env={**repository.environment(), "PREFECT_API_URL": api},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "1 of" in done.stderr and "Traceback" not in done.stdout + done.stderr
    report = repository.root / "sweeps/small/frontier"
    assert json.loads((report / "metrics.json").read_text())["missing"] == 1
    assert "Without an evaluation: pl-0_3-0" in (report / "frontier.md").read_text()


def test_a_stage_takes_parameters_of_a_point_over_its_own(tmp_path):
    from tasks import rounds
    from tasks.dpo import Params
    from tasks.params import read_entry

    (tmp_path / "points.yaml").write_text("policies: {a: {method: x, dpo: {beta: 0.7}}}")
    entry = read_entry(f"{tmp_path}/points.yaml:policies.a")
    assert rounds.load(ROOT / "params.yaml", "dpo", Params, 1, entry).beta == 0.7
    with pytest.raises(UserError, match="did you mean 'a'"):
        read_entry(f"{tmp_path}/points.yaml:policies.aa")
    with pytest.raises(UserError, match="FILE:ENTRY"):
        read_entry("points.yaml")
