"""Laws of the tracker: MLflow sees everything, and whatever happens to it a stage does not notice."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from rankwise.types import UserError
from tasks import lineage, tracking, tracking_notes, tracking_worker
from tasks.tracking_worker import SETTINGS

ROOT = Path(__file__).parent.parent


class Killed(BaseException):
    """As a stage raises it on SIGTERM."""


class Sent:
    """A worker that keeps what it is sent."""

    def __init__(self):
        self.messages = []

    def send(self, message):
        self.messages.append(message)

    def end(self, message):
        self.messages.append(message)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """An empty default store: making its tables takes a second, which one test pays for all."""
    home = tmp_path_factory.mktemp("made")
    code = "from tasks import tracking_runs as t; t.open_store()"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    subprocess.run(
        [sys.executable, "-c", code], env={**environment, **SETTINGS, "RANKWISE_HOME": str(home)}, check=True
    )
    return home


@pytest.fixture
def store(made, fresh):
    """The default store, empty, in an empty working folder."""
    shutil.copytree(made, fresh)
    return fresh


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """The place of a default store that is still to be made."""
    for name in ("MLFLOW_TRACKING_URI", "RANKWISE_TRACKING", "RANKWISE_PARENT_RUN", "RANK", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANKWISE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def client(home: Path):
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "true")
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")


def runs(home: Path) -> dict:
    """Every run in a store, by name."""
    return {run.info.run_name: run for run in client(home).search_runs(["1"])}


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_stage_run_carries_all_that_it_was_told_and_its_headlines_reach_the_parent(store, tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"rows")
    (tmp_path / "note.txt").write_text("a file")
    with tracking.pipeline_run("align", {"target": "evaluate"}) as pipeline:
        with tracking.stage_run("dpo", {"beta": 0.1, "lora": {"r": 8}}) as tracker:
            tracker.dataset(Path("rows.parquet"), "train")
            for step in range(3):
                tracker.metrics({"loss": 3.0 - step, "tokens_per_second": 9.0}, step=step)
            tracker.metrics({"win_rate/mean": 0.8, "time/seconds": 4.0})
            tracker.table("samples", [{"prompt": "a", "policy": "b"}])
            tracker.file(tmp_path / "note.txt")
            tracker.tags({"round": "1"})
        (tmp_path / "dvc.lock").write_text("stages: {dpo: {cmd: x, outs: [{path: p, md5: abc}]}}")
        made = pipeline.run_of("dpo", ran=True)
        assert pipeline.run_of("dpo", ran=False) == made, "a stage taken from the cache leads to the run that made it"
        assert not pipeline.run_of("sft", ran=False)
    assert "RANKWISE_PARENT_RUN" not in os.environ

    found = runs(store)
    dpo, parent = found["dpo"], found["align"]
    assert dpo.info.run_id == made["run_id"] and dpo.info.run_id in made["url"]
    assert (dpo.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    assert dpo.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert dpo.data.tags["round"] == "1"
    assert dpo.data.params == {"beta": "0.1", "lora.r": "8"}
    assert parent.data.params == {"target": "evaluate", "dpo.beta": "0.1", "dpo.lora.r": "8"}
    assert dpo.data.metrics == {"loss": 1.0, "tokens_per_second": 9.0, "win_rate/mean": 0.8, "time/seconds": 4.0}
    assert parent.data.metrics == {"dpo/loss": 1.0, "dpo/win_rate/mean": 0.8}
    assert [m.value for m in client(store).get_metric_history(parent.info.run_id, "dpo/loss")] == [3.0, 2.0, 1.0]
    dataset = dpo.inputs.dataset_inputs[0]
    assert (dataset.dataset.name, dataset.dataset.digest) == ("rows.parquet", lineage.md5_of(tmp_path / "rows.parquet"))
    assert dataset.tags[0].value == "train"
    assert {file.path for file in client(store).list_artifacts(dpo.info.run_id)} == {"note.txt", "samples.json"}
    assert "win_rate" in dpo.data.tags["mlflow.note.content"]
    assert f"[dpo](#/experiments/1/runs/{dpo.info.run_id}" in parent.data.tags["mlflow.note.content"]


def test_a_dead_tracker_changes_nothing_and_costs_seconds(store, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port()}")
    began = time.monotonic()
    with tracking.stage_run("dpo", {"beta": 0.1}) as tracker:
        for step in range(200):
            tracker.metrics({"loss": 1.0}, step=step)
        assert tracker.run_id is None
        assert tracker.model(Path("models/policy"), "rankwise-policy") is None
        tracker.metrics({"loss": 1.0})
    assert time.monotonic() - began < 15
    told = capfd.readouterr()
    assert told.err.count("warning:") == 1 and len(told.err.splitlines()) == 1, told.err
    assert "results are not affected" in told.err and told.out == ""


class Away:
    """A recorder whose server cannot be reached for so many tries."""

    def __init__(self, tries: int):
        self.tries, self.took = tries, []

    def handle(self, message):
        self._reach()
        self.took.append(message["do"])
        return {"ended": True} if message["do"] == "end" else None

    def metrics(self, points):
        self._reach()
        self.took += [point["values"]["loss"] for point in points]

    def _reach(self) -> None:
        self.tries -= 1
        if self.tries >= 0:
            endpoint = "API request to http://m:1/api/2.0/mlflow/runs/log-batch failed with exception"
            raise RuntimeError(f"{endpoint} HTTPConnectionPool(host='m', port=1): Max retries exceeded")


def test_a_server_that_goes_away_and_comes_back_is_told_all_in_its_order(monkeypatch):
    monkeypatch.setattr(tracking_worker, "AWAY_S", 0.05)
    monkeypatch.setattr(tracking_worker, "FLUSH_EVERY_S", 0.05)
    recorder, inbox, replies = Away(3), tracking_worker.Inbox(), io.StringIO()
    serving = threading.Thread(target=tracking_worker._serve, args=(recorder, inbox, replies))
    serving.start()
    inbox.put({"do": "metrics", "values": {"loss": 3.0}})
    inbox.put({"do": "tags", "tags": {}})
    inbox.put({"do": "metrics", "values": {"loss": 2.0}})
    deadline = time.monotonic() + 30
    while recorder.tries > -3 and time.monotonic() < deadline:
        time.sleep(0.01)
    inbox.put({"do": "end", "status": "FINISHED"})
    serving.join(30)
    assert recorder.took == [3.0, "tags", 2.0, "end"]
    told = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert [list(one) for one in told] == [["away"], ["ended"]], "told of once"


@pytest.mark.parametrize("message", ["run", "end", None])
def test_nobody_who_waits_for_an_answer_waits_for_a_server_that_is_away(message):
    recorder, inbox = Away(1000), tracking_worker.Inbox()
    inbox.put({"do": "metrics", "values": {"loss": 3.0}})
    inbox.put({"do": message} if message else None)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="HTTPConnectionPool"):
        tracking_worker._serve(recorder, inbox, io.StringIO())
    assert time.monotonic() - began < 3 and recorder.took == []


def test_only_a_server_that_is_away_is_tried_again(monkeypatch):
    recorder, inbox = Away(0), tracking_worker.Inbox()
    monkeypatch.setattr(recorder, "metrics", lambda points: 1 / 0)
    inbox.put({"do": "metrics", "values": {"loss": 3.0}})
    with pytest.raises(ZeroDivisionError):
        tracking_worker._serve(recorder, inbox, io.StringIO())


def test_a_server_that_never_answers_costs_seconds(store, monkeypatch, capfd):
    monkeypatch.setattr(tracking, "PATIENCE_S", 1.0)
    monkeypatch.setattr(tracking, "PATIENCE_STOPPED_S", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with tracking.stage_run("dpo", {}) as tracker:
            tracker.metrics({"loss": 1.0}, step=1)
        assert time.monotonic() - began < 5
    assert capfd.readouterr().err.count("warning:") == 1


@pytest.mark.parametrize(
    "failure, status, error", [(ValueError("bad"), "FAILED", "ValueError: bad"), (Killed(), "KILLED", "")]
)
def test_an_exception_ends_its_run_and_goes_on(monkeypatch, failure, status, error):
    worker = Sent()
    monkeypatch.setenv("RANKWISE_TRACKING", "on")
    monkeypatch.setattr(tracking, "_Worker", lambda start: worker)
    with pytest.raises(type(failure)), tracking.stage_run("dpo", {}):
        raise failure
    assert worker.messages == [{"do": "end", "status": status, "error": error}]


def test_a_failed_stage_says_why_on_its_page(store):
    with pytest.raises(ValueError), tracking.stage_run("dpo", {}) as tracker:
        tracker._worker._process.stdin.write(b'\n{"do": "metrics", "values": {"lo')
        tracker.metrics({"loss": 2.0}, step=1)
        raise ValueError("row 7 is empty")
    run = runs(store)["dpo"]
    assert run.info.status == "FAILED" and "row 7 is empty" in run.data.tags["mlflow.note.content"]
    assert run.data.metrics == {"loss": 2.0}, "a line cut short by a signal spoils no other"


def test_a_killed_stage_is_not_left_running(store):
    """kill -9 of a stage, which can say nothing any more: its run ends KILLED and keeps what was sent."""
    code = (
        "import time; from tasks import tracking\n"
        "with tracking.stage_run('dpo', {}) as t:\n"
        "    t.metrics({'loss': 2.0}, step=1); print(t.run_id, flush=True); time.sleep(60)"
    )
    stage = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert stage.stdout.readline().strip()
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    deadline = time.monotonic() + 15
    while runs(store)["dpo"].info.status == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.1)
    run = runs(store)["dpo"]
    assert run.info.status == "KILLED" and run.data.metrics == {"loss": 2.0}


def test_a_run_whose_stage_and_worker_died_at_once_is_ended_by_the_next_one_and_a_living_one_is_not(store):
    """kill -9 of a whole container: nobody is left to say how its run ended."""
    code = (
        "import os, sys, time; from tasks import tracking\n"
        "with tracking.stage_run(sys.argv[1], {}) as t:\n"
        "    print(t.run_id, t._worker._process.pid, flush=True); time.sleep(60)"
    )
    start = lambda name: subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE, text=True)
    with start("dead") as dead, start("living") as living:
        worker = int(dead.stdout.readline().split()[1])
        assert living.stdout.readline()
        for pid in (worker, dead.pid):
            os.kill(pid, signal.SIGKILL)
        dead.wait()
        assert runs(store)["dead"].info.status == "RUNNING"
        with tracking.stage_run("next", {}):
            pass
        found = {name: run.info.status for name, run in runs(store).items()}
        living.kill()
    assert found == {"dead": "KILLED", "living": "RUNNING", "next": "FINISHED"}


@pytest.mark.parametrize(
    ("theirs", "gone"),
    [
        ("here boot/1 PID BEGAN", False),
        ("here boot/1 PID 1", True),  # the number is another process's now
        ("here boot/1 4194305 1", True),
        ("here earlier/1 PID BEGAN", True),
        ("here boot/2 4194305 1", False),  # of another container: it cannot be seen from here
    ],
)
def test_a_process_is_gone_only_where_that_can_be_seen(theirs, gone, monkeypatch):
    from tasks import tracking_processes

    host, place, pid, began = tracking_processes.name_of(os.getpid()).split()
    names = {"here": host, "boot/1": place, "PID": pid, "BEGAN": began}
    names |= {"earlier/1": f"earlier/{place.partition('/')[2]}", "boot/2": f"{place.partition('/')[0]}/2"}
    told = " ".join(names.get(part, part) for part in theirs.split())
    assert tracking_processes._is_gone(told, tracking_processes.name_of(os.getpid())) is gone


def test_two_first_stages_at_once_share_a_fresh_store(fresh):
    code = (
        "import sys; from tasks import tracking\n"
        "with tracking.stage_run(sys.argv[1], {'k': 4}) as t:\n"
        "    for i in range(600): t.metrics({'loss': float(i), 'kl': 1.0}, step=i)"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, name], stderr=subprocess.PIPE) for name in ("a", "b")]
    told = [stage.communicate(timeout=60)[1].decode() for stage in both]
    assert told == ["", ""]
    found = runs(fresh)
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert all(run.data.metrics["loss"] == 599.0 for run in found.values())


@pytest.mark.parametrize("name, value", [("RANKWISE_TRACKING", "off"), ("RANK", "1")])
def test_switched_off_or_on_another_rank_nothing_is_started(fresh, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with tracking.stage_run("dpo", {}) as tracker:
        tracker.metrics({"loss": 1.0})
        assert tracker.run_id is None
    assert not fresh.exists()


def test_a_worker_that_crashes_is_told_of_and_changes_nothing(store, capfd):
    with tracking.stage_run("dpo", {}) as tracker:
        assert tracker.run_id
        tracker._worker._process.kill()
        tracker._worker._process.wait()
        tracker.metrics({"loss": 1.0}, step=1)
    assert capfd.readouterr().err.count("warning:") == 1


def test_a_long_run_is_thinned_and_keeps_its_first_and_last_points():
    worker = Sent()
    tracker = tracking.Tracker(worker)
    for step in range(10_001):
        tracker.metrics({"loss": 1.0}, step=step)
    tracker.metrics({"final": 1.0})
    tracker._end("FINISHED")
    steps = [message["step"] for message in worker.messages if message["do"] == "metrics"]
    assert steps[:1000] == list(range(1000))
    assert 10_000 in steps and len(steps) < 5000
    assert steps.count(None) == 1


def test_results_of_rounds_make_one_curve_of_the_parent_and_their_training_curves_do_not_mix(store, monkeypatch):
    with tracking.pipeline_run("align", {}):
        for number, win_rate in ((1, 0.6), (2, 0.7)):
            monkeypatch.setenv("DVC_STAGE", f"dvc.yaml:dpo@{number}")
            with tracking.stage_run("dpo", {"beta": number}) as tracker:
                tracker.metrics({"loss": win_rate}, step=1)
                tracker.metrics({"win_rate": win_rate})
    parent = runs(store)["align"]
    assert parent.data.params == {"dpo.beta": "1", "dpo.2.beta": "2"}
    assert parent.data.metrics == {"dpo/loss": 0.6, "dpo.2/loss": 0.7, "dpo/win_rate": 0.7}
    history = client(store).get_metric_history(parent.info.run_id, "dpo/win_rate")
    assert [(point.step, point.value) for point in history] == [(1, 0.6), (2, 0.7)]


def test_a_step_pays_microseconds_for_being_tracked(store):
    """Under 2 % of a 10 ms step, while the worker is still importing MLflow and reads nothing but the pipe."""
    values = {f"metric_{index}": 0.123456789 for index in range(15)}
    with tracking.stage_run("dpo", {}) as tracker:
        began = time.process_time()
        for step in range(1000):
            tracker.metrics(values, step=step)
        assert (time.process_time() - began) / 1000 < 0.02 * 0.010


def test_stages_do_not_import_mlflow():
    code = "import sys, tasks.tracking, tasks.tracking_ui, tasks.register; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_ui_command_serves_this_machine_only_and_needs_a_store(fresh):
    command = [sys.executable, "-m", "tasks.tracking", "ui", "--print"]
    before = subprocess.run(command, capture_output=True, text=True)
    assert before.returncode == 2 and "no runs yet" in before.stderr
    (fresh / "mlflow").mkdir(parents=True)
    (fresh / "mlflow" / "mlflow.db").touch()
    told = subprocess.run(command, capture_output=True, text=True).stdout
    assert "--host 127.0.0.1" in told and "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false" in told
    assert f"sqlite:///{fresh}/mlflow/mlflow.db" in told


def test_the_machine_is_watched_while_a_stage_runs_and_not_where_that_is_switched_off(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    for name, switch in (("watched", "true"), ("unwatched", "false")):
        monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", switch)
        with tracking.stage_run(name, {}) as tracker:
            assert tracker.run_id
            time.sleep(1.0 if name == "watched" else 0.0)
    found = runs(store)
    assert found["watched"].data.metrics["system/system_memory_usage_megabytes"] > 0
    assert not [name for name in found["unwatched"].data.metrics if name.startswith("system/")]


def test_results_that_no_run_has_are_recorded_once_and_spoilt_ones_are_left(store, tmp_path):
    """One stage ran with MLflow away, one was tracked, one has a report that is not what dvc.lock says."""
    lock = {}
    for stage, loss in (("sft", 2.5), ("dpo@1", 0.5), ("evaluate@1", 0.1)):
        report = Path("reports", stage.partition("@")[0])
        (report / "plots").mkdir(parents=True)
        (report / "metrics.json").write_text(json.dumps({"rows": 7, "kl": {"mean": loss}}))
        (report / "plots/curves.csv").write_text(f"step,loss,held_out_loss\n1,{loss + 1},\n2,{loss},{loss}\n")
        outs = [{"path": f"{report}/metrics.json", "md5": lineage.md5_of(report / "metrics.json")}]
        name = stage.partition("@")[0]
        own = {"rounds.each.1.dpo": {"lora": {"r": 16}}} if name == "dpo" else {}
        params = {name: {"beta": 0.1, "lora": {"r": 8, "alpha": 2}}, **own}
        lock[stage] = {"cmd": "x", "outs": outs, "params": {"params.yaml": params}}
    Path("dvc.lock").write_text(yaml.safe_dump({"stages": lock}))
    Path("reports/evaluate/metrics.json").write_text("{}")
    with tracking.stage_run("sft", {}) as tracker:
        tracker.metrics({"rows": 7, "kl/mean": 2.5})

    def told() -> dict[str, str]:
        with tracking.registry() as registry:
            return {one["stage"]: one["state"] for one in registry.ask("backfill")["runs"]}

    assert told() == {"sft": "known", "dpo@1": "recorded", "evaluate@1": "left"}
    assert told() == {"sft": "known", "dpo@1": "known", "evaluate@1": "left"}
    run = runs(store)["dpo@1"]
    assert run.data.metrics == {"rows": 7.0, "kl/mean": 0.5, "loss": 0.5, "held_out_loss": 0.5}
    assert run.data.params == {"beta": "0.1", "lora.r": "16", "lora.alpha": "2"}
    assert run.data.tags["backfilled"] == "true" and "Recorded afterwards" in run.data.tags["mlflow.note.content"]
    history = client(store).get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.5), (2, 0.5)]


def test_a_command_that_needs_the_registry_says_why_it_has_none(store, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://a:b@127.0.0.1:{closed_port()}")
    said = r"MLflow \(http://127.0.0.1:\d+\).*names a server that runs"
    with pytest.raises(UserError, match=said) as told, tracking.registry() as registry:
        registry.ask("versions", name="m")
    assert "a:b" not in str(told.value) and capfd.readouterr().err == ""


def test_the_page_of_a_pipeline_opens_with_result_setting_and_cost():
    metrics = {"win_rate/judge/mean": 0.91, "win_rate/judge/low": 0.88, "win_rate/judge/high": 0.94, "kl": 16.0}
    said = tracking_notes.headline({f"evaluate/{name}": value for name, value in metrics.items()})
    assert said == "**Wins 91.0 % [88.0, 94.0] by the judge over its reference** · KL 16 nats"
    setting = tracking_notes.setting(yaml.safe_load((ROOT / "params.yaml").read_text()))
    assert "**Data** embedded" in setting and "**Judge** reward_model trained, gold callable" in setting
    assert "β 0.2, learning rate" in setting and "K 4, 1 round" in setting
    assert tracking_notes.setting({"prompts": 3}) == "", "another project's params.yaml"
    spent = {"verdicts": {"judge/prompt_tokens": 900.0, "judge_2/prompt_tokens": 100.0, "judge/money_now": 1.5}}
    told = tracking_notes.cost(spent | {"dpo": {"tokens_seen": 5000.0, "time/tokens_seen": 1.0}})
    assert told == ", 5,000 tokens trained on, judges read 1,000 tokens and wrote 0, 1.50 paid now at the prices given"


def test_two_pipelines_are_compared_by_every_parameter_whichever_stages_ran(store):
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    with tracking.pipeline_run("align", {"target": "evaluate"}), tracking.stage_run("dpo", {"beta": 0.2}):
        pass
    params = runs(store)["align"].data.params
    assert (params["dpo.beta"], params["rollouts.k"], params["rounds.count"]) == ("0.2", "4", "1")
    assert not [name for name in params if name.startswith(("frontier.", "promote.", "rounds.each"))]
