"""Laws of promotion: the alias moves by the rule or by a person's word, behind nobody's back, and can go back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import yaml

from rankwise.types import UserError
from tasks import lineage, promote, promotion, register, tracking, weights
from tasks.stage import Stage
from tasks.tracking_worker import SETTINGS

POLICY = Path("models/policy")
EASY = {"win_rate_above": 0.0, "equal_length_above": 0.0, "gold_not_below": None, "distinct_at_least": 0.0}
EASY |= {"length_at_least": 0.01, "length_at_most": 100.0}
HARD = EASY | {"win_rate_above": 1.0}


class Here:
    """A worker's work in this process; `start` as it would be told."""

    trouble = ""

    def __init__(self, start):
        from tasks.tracking_registry import Acts
        from tasks.tracking_runs import Recorder

        self.does = Acts() if start["kind"] == "registry" else Recorder({"ms": 0, **start})

    def ask(self, message, patience_s=0.0):
        message = json.loads(json.dumps(message))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow's own, which a worker writes into its log
            return self.does.metrics([message]) if message["do"] == "metrics" else self.does.handle(message)

    send = ask

    def end(self, message):
        self.ask({"do": "end", "status": "FINISHED", "error": ""})


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """A finished tiny pipeline of which two policies are registered: the champion is the SFT model."""
    with pytest.MonkeyPatch.context() as patch:
        project = tiny.finished(tmp_path_factory.getbasetemp()).copy(tmp_path_factory.mktemp("registered") / "project")
        enter(project, patch)
        trained = shutil.move(POLICY, project.root / "trained")
        shutil.copytree("models/sft", POLICY)
        register_policy()
        shutil.move(POLICY, weights.home() / lineage.md5_of(POLICY).removesuffix(".dir"))
        shutil.move(trained, POLICY)
        register_policy()
    return project


@pytest.fixture
def project(registered, tmp_path, monkeypatch):
    project = registered.copy(tmp_path / "project")
    enter(project, monkeypatch)
    return project


def enter(project: tiny.Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a project, with MLflow's part in this process."""
    for name, value in (SETTINGS | {"MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("RANKWISE_HOME", str(project.root / ".rankwise"))
    monkeypatch.setattr(Stage, "store", lambda stage, name: project.root / f".rankwise/stores/{name}.sqlite")
    monkeypatch.setenv("RANKWISE_TRACKING", "on")
    monkeypatch.setattr(tracking, "_Worker", lambda start, **_: Here(start))


def register_policy(**changes) -> None:
    params = register.Params(**{"at_least": {}, "at_most": {}, **changes})
    with tracking.stage_run("register", {}) as tracker:
        register.run(params, register.Paths(), Stage("register", tracker=tracker, report=Path("reports/register")))


def ask(verb: str = "check", bounds: dict | None = None, **given) -> dict:
    """tasks.promote with bounds of the rule in params.yaml; returns the record."""
    if bounds is not None:
        params = yaml.safe_load(Path("params.yaml").read_text())
        Path("params.yaml").write_text(yaml.safe_dump(params | {"promote": bounds}))
    return promote.promote(promote.Asked(verb=verb, **given))


def aliases() -> dict[str, str]:
    with tracking.registry() as registry:
        return registry.ask("versions", name="rankwise-policy")["aliases"]


def tags(version: str) -> dict[str, str]:
    with tracking.registry() as registry:
        found = registry.ask("versions", name="rankwise-policy")
    return next(one["tags"] for one in found["versions"] if one["version"] == version)


def test_the_rule_decides_and_a_rollback_undoes_it(project):
    record = ask("apply", HARD)
    assert record["verdict"] == "keep" and record["decision"] is None
    assert "win rate (judge), lower bound" in record["why"] and "above 1 is asked for" in record["why"]
    assert aliases() == {"champion": "1", "challenger": "2"}

    kept = project.tree(".rankwise/stores")
    applied = ask("apply", EASY)
    assert (applied["verdict"], applied["decision"]["by"]) == ("promote", "rule")
    assert applied["metrics"] == record["metrics"] and project.tree(".rankwise/stores") == kept, "nothing asked twice"
    page = Path("reports/promotion/samples.html").read_text()
    assert "The rule holds: version 2 may take the place of version 1" in page and page.count("<article") > 0
    assert tags("2")["promotion.verdict"] == "promote" and "promotion.run_id" in tags("2")

    assert aliases() == {"champion": "2"}
    assert tags("2")["promotion.previous_champion"] == "1" and tags("1")["promotion.replaced_by"] == "2"
    assert ask("apply")["verdict"] == "nothing", "twice is once"
    assert aliases() == {"champion": "2"}

    ask("rollback", reason="readers complained")
    assert aliases() == {"champion": "1"} and "promotion.replaced_by" not in tags("1")
    assert "readers complained" in tags("2")["promotion.history"] and "by rule" in tags("2")["promotion.history"]
    with pytest.raises(UserError, match="no champion before"):
        ask("rollback")
    register_policy()
    again = ask("apply", EASY)
    assert again["verdict"] == "keep" and "it was rolled back before: a person decides" in again["why"]


def test_a_person_decides_for_or_against_the_rule_and_is_kept_with_the_version(project):
    assert ask("check", HARD)["verdict"] == "keep"
    assert aliases() == {"champion": "1", "challenger": "2"}, "to look moves nothing"
    record = ask("approve", by="Ada", reason="better jokes", versions="1,2")
    assert record["decision"] | {"at": ""} == {"what": "promoted", "by": "Ada", "reason": "better jokes", "at": ""}
    assert record["verdict"] == "keep", "what the rule said stays on record"
    found = tags("2")
    assert (found["promotion.decided_by"], found["promotion.reason"]) == ("Ada", "better jokes")
    assert aliases() == {"champion": "2"}
    with pytest.raises(UserError, match="no challenger to approve"):
        ask("approve", by="Ada", reason="again")


def test_a_challenger_that_is_turned_down_is_none_any_more(project):
    ask("reject", by="Ada", reason="rude")
    assert aliases() == {"champion": "1"} and tags("2")["promotion.decision"] == "rejected"
    assert ask("check", EASY)["verdict"] == "nothing"


def test_a_decision_on_a_pair_that_is_no_longer_there_changes_nothing(project, monkeypatch):
    with pytest.raises(UserError, match=r"are 1,2 by now, and --versions 1,7"):
        ask("approve", EASY, by="Ada", reason="x", versions="1,7")
    real = promote._judged

    def meanwhile(params, pair, registry, asked):
        record = real(params, pair, registry, asked)
        registry.ask("move", name="rankwise-policy", seen={}, to={"champion": "2"}, tags={})
        return record

    monkeypatch.setattr(promote, "_judged", meanwhile)
    with pytest.raises(UserError, match=r"were moved meanwhile.*nothing was changed here"):
        ask("apply")
    assert aliases() == {"champion": "2", "challenger": "2"}


def test_without_a_champion_a_challenger_needs_its_gates_alone(project):
    with tracking.registry() as registry:
        registry.ask("move", name="rankwise-policy", seen={}, to={"champion": None}, tags={})
    record = ask("apply", HARD)
    assert record["decision"]["what"] == "promoted" and "no champion" in record["why"]
    assert aliases() == {"champion": "2"}


def test_a_version_that_was_registered_again_keeps_what_its_promotion_said(project):
    ask("approve", HARD, by="Ada", reason="better jokes")
    register_policy()
    from mlflow.tracking import MlflowClient

    text = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_model_version("rankwise-policy", "2").description
    assert text.startswith("Promoted: version 2 is champion after version 1. Decided by Ada")
    assert text.count("Promoted:") == 1 and text.count("All gates passed.") == 1


def test_without_a_model_or_a_tracker_the_mend_is_named(project, monkeypatch, capsys):
    with pytest.raises(UserError, match="nobody: no model of this name is registered"), tracking.registry() as registry:
        registry.ask("versions", name="nobody")
    monkeypatch.setenv("RANKWISE_TRACKING", "off")
    assert promote.main([]) == 2
    assert "RANKWISE_TRACKING is off" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        promote.main(["--approve", "Ada"])
    assert "want a --reason" in capsys.readouterr().err


# The rule -------------------------------------------------------------------------------------------------------------

METRICS = {
    "win_rate": {"judge": {"mean": 0.6, "low": 0.52, "high": 0.68}, "gold": {"mean": 0.5, "low": 0.42, "high": 0.58}},
    "win_rate_length_controlled": {"judge": 0.58, "gold": 0.5},
    "length": {"policy": 30.0, "reference": 30.0},
    "distinct_1": {"policy": 0.2, "reference": 0.2},
    "distinct_2": {"policy": 0.5, "reference": 0.5},
}


def failures(**changes) -> list[str]:
    gates, decided = changes.pop("gates", "passed"), changes.pop("decided", "")
    found = promotion.check(METRICS | changes, promotion.Params(), gates=gates, decided=decided)
    return [one.name for one in found if not one.passed]


def judged(low: float, high: float, judge: str = "judge") -> dict:
    return {"win_rate": METRICS["win_rate"] | {judge: {"mean": (low + high) / 2, "low": low, "high": high}}}


@pytest.mark.parametrize(
    "change, failed",
    [
        ({}, ""),
        (judged(0.5, 0.6), "win rate (judge), lower bound"),  # above one half, not at it
        (judged(0.3, 0.49, "gold"), "win rate (gold), upper bound"),  # gold says the contrary
        (judged(0.3, 0.5, "gold"), ""),  # gold cannot tell
        ({"win_rate_length_controlled": {"judge": 0.5}}, "win rate at equal length (judge)"),
        ({"length": {"policy": 46.0, "reference": 30.0}}, "length of answers over the champion's"),
        ({"length": {"policy": 19.0, "reference": 30.0}}, "length of answers over the champion's"),
        ({"distinct_2": {"policy": 0.44, "reference": 0.5}}, "distinct-2 over the champion's"),
        ({"distinct_1": {"policy": 0.17, "reference": 0.2}}, "distinct-1 over the champion's"),
        ({"gates": "failed"}, "its own gates: failed"),
        ({"decided": "rejected"}, "it was rejected before: a person decides"),
        ({"decided": "promoted"}, ""),
    ],
)
def test_each_condition_of_the_rule_fails_by_itself(change, failed):
    assert failures(**change) == ([failed] if failed else [])


def test_gold_stands_in_where_there_is_no_judge():
    only = {"win_rate": {"gold": {"mean": 0.6, "low": 0.55, "high": 0.7}}, "win_rate_length_controlled": {"gold": 0.6}}
    assert failures(**only) == []


# Weights --------------------------------------------------------------------------------------------------------------


@contextmanager
def spoilt(path: Path):
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)


def test_weights_are_found_in_dvcs_cache_and_at_their_commit_or_the_mend_is_named(tmp_path, monkeypatch):
    """A version's weights after the folder has moved on: from the cache, from a remote at the commit, else an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKWISE_HOME", str(tmp_path / ".rankwise"))
    monkeypatch.delenv("RANKWISE_POLICY", raising=False)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@b.c")

    def run(*words: str) -> str:
        words = (sys.executable, "-m", *words) if words[0] == "dvc" else words
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()

    POLICY.mkdir(parents=True)
    (POLICY / "config.json").write_text('{"model": 1}')
    (POLICY / "deep").mkdir()
    (POLICY / "deep/model.safetensors").write_bytes(b"first")
    run("git", "init", "-q")
    run("dvc", "init", "-q")
    run("dvc", "config", "core.analytics", "false")
    run("dvc", "remote", "add", "-q", "-d", "store", str(tmp_path / "remote"))
    run("dvc", "add", "-q", str(POLICY))
    run("dvc", "push", "-q")
    run("git", "add", "-A")
    run("git", "commit", "-q", "-m", "first")
    commit, md5 = run("git", "rev-parse", "HEAD"), lineage.md5_of(POLICY)
    assert weights.find(md5, POLICY) == POLICY
    shutil.rmtree(POLICY)
    with pytest.raises(UserError, match="DVC's cache: nothing"), spoilt(tmp_path / ".dvc/cache"):
        weights.find(md5, POLICY)
    found = weights.find(md5, POLICY)
    assert found == weights.home() / md5.removesuffix(".dir") and lineage.md5_of(found) == md5
    shutil.rmtree(weights.home())
    shutil.rmtree(tmp_path / ".dvc/cache")
    assert (
        lineage.md5_of(weights.find(md5, POLICY, revisions=weights.revisions_of(f"{commit}+dirty", "runs/none"))) == md5
    )
    shutil.rmtree(weights.home())
    shutil.rmtree(tmp_path / ".dvc/cache", ignore_errors=True)
    shutil.rmtree(tmp_path / "remote")
    with pytest.raises(UserError, match=rf"models/policy: not there.*git checkout {commit} dvc\.lock"):
        weights.find(md5, POLICY, revisions=[commit])
    assert list(weights.home().iterdir()) == [], "nothing half fetched is left"


def test_other_weights_from_anywhere_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKWISE_HOME", str(tmp_path / ".rankwise"))

    def download(aside: Path) -> bool:
        aside.mkdir()
        (aside / "config.json").write_text("{}")
        return True

    with pytest.raises(UserError, match="MLflow: other weights"):
        weights.find("0" * 32 + ".dir", POLICY, download=download)


def test_a_version_is_had_as_a_folder_by_number_or_alias(project, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    assert weights.main(["champion", str(tmp_path / "one")]) == 0
    assert weights.main(["2", str(tmp_path / "two")]) == 0
    assert lineage.md5_of(tmp_path / "two") == lineage.md5_of(POLICY) != lineage.md5_of(tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert weights.main(["2", str(tmp_path / "two")]) == 2 and weights.main(["9", str(tmp_path / "nine")]) == 2
    said = capsys.readouterr().err
    assert "is there already" in said and "no version or alias '9' (versions: 1, 2; aliases: challenger (2)" in said


def test_a_copy_in_mlflow_stands_in_for_the_weights(project, tmp_path):
    (POLICY / "generation_config.json").write_text("{}")
    register_policy(log_weights=True)
    md5 = lineage.md5_of(POLICY)
    shutil.rmtree(POLICY)
    assert weights.main(["challenger", str(tmp_path / "copy")]) == 0
    assert lineage.md5_of(tmp_path / "copy") == md5
