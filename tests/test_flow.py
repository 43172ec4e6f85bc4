"""Laws of the flow: it is `dvc repro` that a person can watch, stop and continue."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import psutil
import pytest
from conftest import Toy

from flows import keys, process, server, stages, summary

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def done(api, tmp_path_factory) -> tuple[Toy, subprocess.CompletedProcess]:
    """A toy project after one whole run, and what the run said. Copy it, do not change it."""
    toy = Toy(tmp_path_factory.mktemp("done") / "toy")
    return toy, toy.run(PREFECT_API_URL=api)


@pytest.fixture
def finished(done, tmp_path) -> Toy:
    return done[0].copy(tmp_path / "copy")


def run_id(said: str) -> str:
    return said.partition("/runs/flow-run/")[2].split()[0]


def task_runs(client, flow_run: str, expected: int) -> dict:
    """The task runs of a flow run by name, once the server has stored so many final ones."""
    from prefect.client.schemas.filters import FlowRunFilter

    only = FlowRunFilter.model_validate({"id": {"any_": [flow_run]}})
    assert server.wait_until_recorded(
        lambda: [run.state for run in client.read_task_runs(flow_run_filter=only)], expected
    )
    return {run.name: run for run in client.read_task_runs(flow_run_filter=only)}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(met)


def test_flow_and_bare_repro_leave_the_same_lock(done, toy):
    flown, said = done
    assert said.returncode == 0, said.stdout
    toy.command("dvc", "repro")
    assert (flown.root / "dvc.lock").read_bytes() == (toy.root / "dvc.lock").read_bytes()
    assert flown.attempts() == toy.attempts() == list(Toy.ORDER)


def test_a_person_finds_stages_by_name_with_their_edges_and_metrics(done, client):
    from prefect.client.schemas.filters import ArtifactFilter

    _, said = done
    runs = task_runs(client, run_id(said.stdout), len(Toy.ORDER))
    assert set(runs) == set(Toy.ORDER)
    assert [up.id for up in runs["sft"].task_inputs["wait_for"]] == [runs["prompts"].id]
    assert client.read_flow_run(run_id(said.stdout)).name.endswith(": 4 ran")
    only = ArtifactFilter.model_validate({"flow_run_id": {"any_": [run_id(said.stdout)]}})
    artifacts = {artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=only)}
    assert "| kl.mean | 1.5 |" in artifacts["sft"].data and artifacts["sft"].task_run_id == runs["sft"].id
    assert "| verdicts | ran |" in artifacts["summary"].data


def test_stage_lines_reach_the_terminal_and_prefect_once_and_without_a_second_name(done, client):
    from prefect.client.schemas.filters import LogFilter

    _, said = done
    assert said.stdout.count("| sft | started") == 1 and "[sft]" not in said.stdout
    only = LogFilter.model_validate({"flow_run_id": {"any_": [run_id(said.stdout)]}})
    assert wait_for(lambda: [log.message for log in client.read_logs(only)].count("started") == len(Toy.ORDER), 10)


def test_skipped_stages_show_as_cached(finished, api, client):
    (finished.root / "sft.txt").unlink()
    said = finished.run(PREFECT_API_URL=api)
    states = {name: run.state for name, run in task_runs(client, run_id(said.stdout), len(Toy.ORDER)).items()}
    assert {state.name for state in states.values()} == {"Cached"}
    assert states["prompts"].message == "didn't change"
    assert states["sft"].message == "restored from DVC's cache"
    assert finished.attempts() == list(Toy.ORDER), "a cached stage ran"
    assert "4 cached" in said.stdout


def test_a_run_with_nothing_to_do_says_so_and_starts_no_server(finished):
    began = time.monotonic()
    said = finished.run()
    assert said.returncode == 0 and time.monotonic() - began < 15
    assert "every stage is up to date" in said.stdout and said.stdout.count("cached") == len(Toy.ORDER) + 1
    assert not (finished.root / ".rankwise/prefect").exists()


@pytest.mark.parametrize("share", [0, 0.5])
def test_over_a_lock_that_dvc_left_cut_off_nothing_is_computed_again(finished, api, share):
    """Killed while it wrote it: dvc.lock is empty, or ends somewhere."""
    lock, before = finished.root / "dvc.lock", finished.attempts()
    whole = lock.read_bytes()
    lock.write_bytes(whole[: int(len(whole) * share)])
    told = finished.run(PREFECT_API_URL=api)
    assert told.returncode == 0 and ("dvc.lock ends in the middle" in told.stdout) == (share == 0), told.stdout
    assert lock.read_bytes() == whole and finished.attempts() == before


@pytest.mark.parametrize(("old", "new"), [("schema: '2.0'", "<<<<<<< ours"), ("stages:", "stagez:"), ("2.0", "3.0")])
def test_a_lock_that_is_wrong_in_another_way_is_a_persons_to_mend(finished, api, old, new):
    """A merge left it half done, a slip of a hand, a newer DVC."""
    lock = finished.root / "dvc.lock"
    lock.write_text(lock.read_text().replace(old, new, 1))
    wrong = lock.read_bytes()
    told = finished.run(PREFECT_API_URL=api)
    assert told.returncode == 2 and "dvc.lock" in told.stdout and lock.read_bytes() == wrong


@pytest.mark.parametrize("guarded", [True, False])
def test_killed_while_dvc_writes_its_lock_the_old_one_is_whole(finished, guarded):
    """DVC's own command empties it first. Once it does not, half of flows/guarded_dvc.py may go."""
    script = f"""
import os
from dvc.cli import main
from dvc.utils.serialize import _yaml
def killed(data, stream):
    stream.write("schema: ")
    stream.flush()
    os._exit(9)
_yaml._dump = killed
if {guarded}:
    from flows.guarded_dvc import guard
    guard()
main(["repro", "--force", "sft"])
"""
    lock = finished.root / "dvc.lock"
    before = lock.read_text()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run([sys.executable, "-c", script], cwd=finished.root, env=environment, capture_output=True)
    assert done.returncode == 9, done.stderr.decode()
    assert (lock.read_text() == before) == guarded


def test_failure_names_stage_reason_and_command(toy, api):
    said = toy.run("--target", "verdicts", PREFECT_API_URL=api, TOY_FAIL="sft")
    end = said.stdout.splitlines()[-2:]
    assert said.returncode == 2
    assert end[0] == "error: stage sft failed: row 7: no prompt; add one"
    assert "python -m flows.align --target verdicts" in end[1] and "dvc repro -s sft" in end[1]
    assert "Traceback" not in said.stdout and "NoneType" not in said.stdout
    assert toy.attempts() == ["prompts", "sft"], "a mistake was tried again, or a later stage ran"


def test_only_stages_with_outside_reasons_are_tried_again():
    from prefect.states import Failed

    class Run:
        run_count = 1

    failed, mistake = Failed(message="503"), Failed(name=stages.MISTAKE)
    away = Failed(name=stages.AWAY)
    verdicts, dpo = (stages.run_stage.with_options(name=name) for name in ("verdicts@2", "dpo"))
    assert stages.worth_a_retry(verdicts, Run, failed)
    assert not stages.worth_a_retry(dpo, Run, failed)
    assert not stages.worth_a_retry(verdicts, Run, mistake)
    assert stages.worth_a_retry(verdicts, Run, away) and stages.worth_a_retry(dpo, Run, away)
    Run.run_count = len(stages.RETRY_AFTER_S) + 1
    assert not stages.worth_a_retry(verdicts, Run, failed) and not stages.worth_a_retry(dpo, Run, away)


def test_a_stopped_stage_is_not_revived_by_a_retry(monkeypatch):
    from prefect.states import Failed

    class Run:
        run_count = 1

    monkeypatch.setattr(process, "stopping", type(process.stopping)())
    process.stopping.set()
    assert not stages.worth_a_retry(stages.run_stage.with_options(name="verdicts"), Run, Failed())


def test_a_second_run_of_a_checkout_is_refused(finished, api):
    lock = finished.root / ".dvc/tmp/rankwise.lock"
    with open(lock, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        said = finished.run(PREFECT_API_URL=api)
    assert said.returncode == 2 and said.stdout.splitlines()[-1].startswith("error: another run of this checkout")


def test_a_mistake_on_the_command_line_gets_one_line(toy):
    said = toy.run("--target", "evalute")
    assert said.returncode == 2
    assert said.stdout.splitlines() == [
        "error: no stage 'evalute' in dvc.yaml; did you mean 'evaluate'? (stages: evaluate, prompts, sft, verdicts)"
    ]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopping_the_flow_waits_for_a_checkpoint_and_leaves_no_children(toy, api, number, status):
    flow = toy.start(PREFECT_API_URL=api, TOY_NAP="120")
    note = toy.root / "prompts.pid"
    assert wait_for(lambda: note.exists() and note.read_text())
    time.sleep(0.3)
    flow.send_signal(number)
    said, _ = flow.communicate(timeout=90)
    assert flow.returncode == status, said
    assert (toy.root / "prompts.checkpoint").exists() and not alive(int(note.read_text()))
    assert said.splitlines()[-1].endswith("Continue with: python -m flows.align")


def test_killing_the_flow_leaves_no_children(toy, api):
    """kill -9 runs no handler: the kernel tells dvc, whose death the stage is told of."""
    flow = toy.start(PREFECT_API_URL=api, TOY_NAP="120")
    note = toy.root / "prompts.pid"
    assert wait_for(lambda: note.exists() and note.read_text())
    [dvc] = Path(f"/proc/{flow.pid}/task/{flow.pid}/children").read_text().split()
    flow.kill()
    flow.communicate()
    assert wait_for(lambda: not alive(int(dvc)), 5)


def test_a_stage_that_takes_too_long_leaves_a_checkpoint_and_is_not_tried_again(toy, api, client):
    said = toy.run("--stage-hours", "0.001", PREFECT_API_URL=api, TOY_NAP="120")
    assert said.returncode == 1 and (toy.root / "prompts.checkpoint").exists()
    assert "stage prompts failed: took longer than 0.001 h" in said.stdout
    assert client.read_flow_run(run_id(said.stdout)).state.name == stages.TIMED_OUT and toy.attempts() == ["prompts"]
    assert toy.run("--stage-hours", "1", PREFECT_API_URL=api).returncode == 0


def test_the_end_table_shows_what_was_measured_and_nothing_else():
    report = {
        "win_rate": {"judge": {"mean": 0.914, "low": 0.88, "high": 0.94}},
        "reward": {"policy": {"mean": 2.0, "low": 1.5, "high": 2.5}, "reference": {"mean": 0.25}},
        "length": {"policy": 20.25},
        "kl": {"mean": 3.0, "low": None, "high": None},
        "unknown": 7,
    }
    assert summary.headline(report) == [
        ("win rate (judge)", "91.4 % [88.0 %, 94.0 %]", ""),
        ("reward", "2 [1.5, 2.5]", "0.25"),
        ("KL to the reference (nats)", "3", ""),
        ("answer length (words)", "20.25", ""),
    ]


def test_a_failed_run_shows_no_result_of_an_earlier_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    report = Path("reports/evaluate/metrics.json")
    report.parent.mkdir(parents=True)
    report.write_text('{"preference_accuracy": 0.9}')
    ran = summary.Outcome(stage="dpo", state="ran", seconds=90)
    summary.show([ran], prefect="here")
    assert "90.0 %" in (shown := capsys.readouterr().out) and "1.50" in shown
    summary.show([ran, summary.Outcome(stage="evaluate", state="failed", note="[no] rows")], prefect="here")
    assert "90.0 %" not in (shown := capsys.readouterr().out) and "[no] rows" in shown


def test_make_hands_its_options_to_the_flow():
    words = ["make", "-n", "run", "TARGET=dpo", "RECIPE=recipes/x.yaml", "DATA=a b"]
    told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-m flows.align --target dpo --recipe recipes/x.yaml --data a b" in " ".join(told.split())


def files_that_hold(text: str, *folders: Path) -> list[Path]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if text.encode() in path.read_bytes()]


def test_a_key_from_a_prefect_secret_reaches_the_stage_and_no_file_or_log(toy, api, client, tmp_path):
    from prefect.blocks.system import Secret
    from prefect.client.schemas.filters import LogFilter
    from prefect.settings import PREFECT_API_URL, temporary_settings

    key, note = "sk-canary-5b1f0c9d", tmp_path / "digests"
    with temporary_settings({PREFECT_API_URL: api}):
        Secret(value=key).save("rankwise-judge-api-key", overwrite=True)
    script = toy.root / "stage.py"
    digest = "__import__('hashlib').sha256(os.environ.get('RANKWISE_JUDGE_API_KEY', '').encode()).hexdigest()"
    script.write_text(f"{script.read_text()}\nopen({str(note)!r}, 'a').write({digest} + '\\n')\n")
    said = toy.run("--target", "sft", PREFECT_API_URL=api, RANKWISE_JUDGE_URL="http://127.0.0.1:9/v1")
    assert said.returncode == 0, said.stdout
    assert set(note.read_text().split()) == {hashlib.sha256(key.encode()).hexdigest()}
    only = LogFilter.model_validate({"flow_run_id": {"any_": [run_id(said.stdout)]}})
    logs = "".join(log.message for log in client.read_logs(only))
    assert "started" in logs and key not in said.stdout + logs
    assert files_that_hold("started", toy.root) and not files_that_hold(key, toy.root, home_of(api))


def test_a_key_of_the_environment_wins_over_the_secret_and_no_server_means_no_look(monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert keys.from_secrets({"RANKWISE_JUDGE_URL": "http://h/v1", "RANKWISE_JUDGE_API_KEY": "k"}) == {}
    assert keys.from_secrets({"PREFECT_API_URL": "http://h", "RANKWISE_HOME": "x"}) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "stage", "why"),
    [("TOY_CRASH", "verdicts", "RuntimeError: the judge is away"), ("TOY_AWAY", "sft", "the server is away")],
)
def test_a_stage_that_failed_for_outside_reasons_is_tried_again(toy, api, how, stage, why):
    said = toy.run(PREFECT_API_URL=api, RANKWISE_RETRY_AFTER_S="0.1 0.1", **{how: stage})
    assert said.returncode == 1
    assert toy.attempts() == [*Toy.ORDER[: Toy.ORDER.index(stage)], stage, stage, stage]
    assert f"error: stage {stage} failed: {why}" in said.stdout


@pytest.mark.slow
def test_a_run_with_its_own_server_keeps_every_row_and_leaves_no_process(toy, monkeypatch):
    said = toy.run()
    assert said.returncode == 0, said.stdout
    own = subprocess.run(["pgrep", "-f", str(toy.root / ".rankwise")], capture_output=True, text=True)
    assert not own.stdout
    monkeypatch.chdir(toy.root)
    monkeypatch.setattr(server, "HOME", Path(".rankwise/prefect"))
    again = server.Server(server.free_port(), lean=True)
    try:
        again.wait()
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: again.url}), get_client(sync_client=True) as client:
            assert set(task_runs(client, run_id(said.stdout), len(Toy.ORDER))) == set(Toy.ORDER)
    finally:
        again.stop()


def test_a_neighbours_server_is_not_the_one_that_this_checkout_keeps_open(api, tmp_path, monkeypatch):
    """Its own was killed outright and left its note; another checkout's has the port since."""
    monkeypatch.setattr(server, "HOME", tmp_path)
    note, port = tmp_path / "server.json", port_of(api)
    note.write_text(json.dumps({"url": api, "pid": os.getpid()}))
    assert server.kept_open() is None
    sockets = psutil.net_connections("tcp")
    pid = next(one.pid for one in sockets if one.status == psutil.CONN_LISTEN and one.laddr.port == port)
    note.write_text(json.dumps({"url": api, "pid": pid}))
    assert server.kept_open() == api


@pytest.mark.slow
def test_a_neighbour_that_takes_the_port_while_a_server_starts_is_not_taken_for_it(api, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "HOME", tmp_path)
    monkeypatch.setattr(server, "DEFAULT_PORT", port_of(api))
    looks, really = iter([server.DEFAULT_PORT]), server.free_port
    monkeypatch.setattr(server, "free_port", lambda port=None: next(looks, None) or really(port))
    own = server.Server.for_one_run()
    try:
        assert own.url != api and server.healthy(own.url)
    finally:
        own.stop()


def home_of(url: str) -> Path:
    """The folder in which a Prefect server keeps what it knows."""
    with urllib.request.urlopen(f"{url}/admin/settings", timeout=20) as reply:
        return Path(json.load(reply)["home"])


def port_of(url: str) -> int:
    return urllib.parse.urlsplit(url).port


@pytest.mark.slow
def test_nothing_that_a_run_starts_looks_up_a_name_outside(toy, tmp_path):
    """Every Python process of the run (flow, server, dvc, stages) notes the names that it looks up."""
    trap, noted = tmp_path / "trap", tmp_path / "looked-up"
    trap.mkdir()
    (trap / "sitecustomize.py").write_text(
        "import socket\n_real = socket.getaddrinfo\n"
        "def _noting(host, *rest, **more):\n"
        f"    open({str(noted)!r}, 'a').write(f'{{host}}\\n')\n"
        "    return _real(host, *rest, **more)\n"
        "socket.getaddrinfo = _noting\n"
    )
    # A CI variable alone would switch some telemetry off and hide what is tested here.
    quiet = {name: "" for name in ("CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST") if name in os.environ}
    said = toy.run(PYTHONPATH=str(trap), RANKWISE_TRACKING="on", **quiet)
    assert said.returncode == 0, said.stdout
    names = set(noted.read_text().split())
    assert names and names <= {"127.0.0.1", "localhost", "::1", "None"}, names
