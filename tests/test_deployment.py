"""Laws of deployments: a run works in a checkout of its own, shares what is costly, publishes, and can be killed."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from conftest import Toy, prefect_server
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.filters import DeploymentFilter
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, temporary_settings
from test_flow import alive, task_runs, wait_for

from flows import checkout, stages
from flows.git import git
from rankwise.types import UserError

ROOT = Path(__file__).parent.parent
AUTHOR = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


class Project(Toy):
    """The toy project under git, with its flows as deployments of a server and a worker for them."""

    def __init__(self, root: Path, url: str):
        super().__init__(root)
        shutil.copy(ROOT / "prefect.yaml", root)
        (root / "flows").symlink_to(ROOT / "flows")
        (root / "dvc.yaml").write_text(
            (root / "dvc.yaml").read_text().replace("  sft:", "  sft:\n    meta: {accelerated: true}")
        )
        self.remote = root.parent / "remote"
        self.environment = {
            "PREFECT_API_URL": url,
            "PREFECT_HOME": str(root.parent / "prefect-home"),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "RANKWISE_REMOTE": str(self.remote),
            **AUTHOR,
        }
        self.commit("a toy")

    def commit(self, title: str) -> str:
        self.command("git", "add", "-A")
        self.command("git", "commit", "-q", "-m", title, **AUTHOR)
        return git("rev-parse", "HEAD", where=self.root).stdout.strip()

    def prefect(self, *words: str) -> str:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *words]
        return self.command(*command, **self.environment).stdout.decode()

    def order(self, deployment: str = "align/align", **parameters: object) -> str:
        """Ask for a run; returns its id."""
        words = [f"--param={name}={json.dumps(value)}" for name, value in parameters.items()]
        said = self.prefect("deployment", "run", deployment, *words)
        return said.partition("/runs/flow-run/")[2].split()[0]

    def start_worker(self) -> None:
        words = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "rankwise"]
        env = {**os.environ, **self.environment}
        with open(self.root.parent / "worker.log", "a", encoding="utf-8") as log:
            self.worker = subprocess.Popen(
                words, cwd=self.root, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def nap(self, seconds: float) -> None:
        """A commit with which every stage is stale and takes so long."""
        script = self.root / "stage.py"
        line = next(line for line in script.read_text().splitlines() if line.startswith("time.sleep("))
        script.write_text(script.read_text().replace(line, f"time.sleep({seconds})"))
        self.commit(f"naps of {seconds} s")

    def checkout_of(self, flow_run: str) -> Path:
        [folder] = (self.root / ".rankwise/checkouts").glob(f"*-{flow_run[:8]}")
        return folder


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """A whole Prefect server, scheduler and all; gives its API address."""
    with prefect_server(tmp_path_factory, lean=False) as url:
        yield url


@pytest.fixture(scope="module")
def project(api, tmp_path_factory):
    """The toy project, deployed, and a worker for it."""
    project = Project(tmp_path_factory.mktemp("project") / "toy", api)
    project.prefect("work-pool", "create", "rankwise", "--type", "process")
    project.start_worker()
    project.prefect("deploy", "--all")
    yield project
    os.killpg(project.worker.pid, signal.SIGKILL)
    project.worker.wait()


@pytest.fixture(scope="module")
def told(project, api):
    """The automations, made twice, and what they tell a person."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ear) as ear:
        threading.Thread(target=ear.serve_forever, daemon=True).start()
        with temporary_settings({PREFECT_API_URL: api}):
            CustomWebhookNotificationBlock(
                name="ear", url=f"http://127.0.0.1:{ear.server_port}", json_data={"text": "{{subject}}: {{body}}"}
            ).save("ear")
        for _ in range(2):
            words = ["flows.automations", "--notify", "custom-webhook/ear", "--silence-s", "35"]
            project.command(sys.executable, "-m", *words, **project.environment)
        yield Ear.told
        ear.shutdown()


class Ear(http.server.BaseHTTPRequestHandler):
    told: ClassVar[list[str]] = []

    def do_POST(self):
        self.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def end_of(client, flow_run: str, seconds: float = 90):
    """The state in which a run ends."""
    assert wait_for(lambda: client.read_flow_run(flow_run).state.is_final(), seconds), client.read_flow_run(flow_run)
    return client.read_flow_run(flow_run).state


@pytest.mark.slow
def test_deploying_asks_nothing_and_the_nightly_one_is_scheduled(project, client):
    """A scheduler that fails in silence (SQLAlchemy 2.1) would leave a healthy server without a single run."""
    names = {deployment.name: deployment for deployment in client.read_deployments()}
    assert {"align", "nightly", "frontier"} <= set(names)
    [schedule] = names["nightly"].schedules
    assert schedule.schedule.cron == "0 2 * * *" and schedule.active

    def due() -> list:
        only = DeploymentFilter.model_validate({"id": {"any_": [names["nightly"].id]}})
        return client.read_flow_runs(deployment_filter=only)

    assert wait_for(lambda: len(due()) >= 3, 60)
    form = names["align"].parameter_openapi_schema["properties"]
    assert "sft" in json.dumps(form["target"]) and "dpo.beta=0.3" in form["overrides"]["description"]


@pytest.mark.slow
def test_a_run_is_of_a_commit_shares_the_cache_and_publishes(project, client, tmp_path):
    """Whoever works in the repository's folder is left alone, and finds the results on a branch and in the remote."""
    (project.root / "stage.py").write_text("raise SystemExit('an edit that no commit has')\n")
    # Another run has the only GPU: the first stage that wants one waits.
    client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=stages.GPU_LIMIT, limit=1))
    client.increment_concurrency_slots([stages.GPU_LIMIT], 1, "concurrency")
    try:
        first = project.order(target="sft")
        begun = project.root / ".rankwise" / "checkouts"
        assert wait_for(lambda: list(begun.glob(f"*-{first[:8]}/prompts.txt")), 90)
        time.sleep(5)
        assert not list(begun.glob(f"*-{first[:8]}/sft.pid"))
        client.release_concurrency_slots([stages.GPU_LIMIT], 1, 5.0)
        state = end_of(client, first)
    finally:
        client.delete_global_concurrency_limit_by_name(stages.GPU_LIMIT)
        project.command("git", "checkout", "stage.py")
    assert state.is_completed(), state
    folder = project.checkout_of(first)
    assert (folder / "attempts.log").read_text().split() == ["prompts", "sft"] and project.attempts() == []
    assert not (project.root / "dvc.lock").exists()
    assert git("status", "--porcelain", where=project.root).stdout == ""

    # Another person: the branch and the remote are all that it takes.
    branch = f"runs/{folder.name}"
    git("clone", "-q", "-b", branch, str(project.root), str(tmp_path / "other"))
    other = object.__new__(Toy)
    other.root = tmp_path / "other"
    other.command("dvc", "remote", "add", "-d", "r", str(project.remote))
    other.command("dvc", "pull", "--run-cache", "sft")
    assert (other.root / "sft.txt").read_text() == "sft"
    assert b"sft" in other.command("git", "log", "-1", "--format=%s").stdout

    # A second run, of the same commit: a fresh checkout, and nothing of the first is computed again.
    second = project.order()
    assert end_of(client, second).is_completed()
    assert (project.checkout_of(second) / "attempts.log").read_text().split() == ["verdicts", "evaluate"]
    states = {name: one.state.name for name, one in task_runs(client, second, 5).items()}
    assert states["sft"] == "Cached" and states["verdicts"] == "Completed" and states["publish"] == "Completed"


@pytest.mark.slow
def test_a_revision_is_what_its_name_says_and_an_unknown_one_is_told(project, client, told):
    old = git("rev-parse", "HEAD", where=project.root).stdout.strip()
    script = (project.root / "stage.py").read_text()
    (project.root / "stage.py").write_text(script + "\nprint('newer')\n")
    project.commit("newer code")
    wanted, unknown = project.order(target="prompts", revision=old[:12]), project.order(revision="no-such-branch")
    assert end_of(client, wanted).is_completed()
    assert (project.checkout_of(wanted) / "stage.py").read_text() == script
    state = end_of(client, unknown)
    assert state.name == "Mistake" and "has no revision 'no-such-branch'" in state.message
    assert wait_for(lambda: any("has no revision 'no-such-branch'" in one and unknown in one for one in told))
    with temporary_settings({PREFECT_API_URL: project.environment["PREFECT_API_URL"]}):
        resource = {"prefect.resource.id": f"prefect.flow-run.{wanted}", "prefect.resource.name": "nightly"}
        emit_event("rankwise.gates.failed", resource=resource, payload={"gates": ["kl.mean = 9, at most 5: failed"]})
        EventsWorker.drain_all(timeout=5, at_exit=False)
    assert wait_for(lambda: any("nightly: kl.mean = 9, at most 5: failed" in one for one in told)), told
    assert sum("has no revision" in one for one in told) == 1, "made twice, it tells once"


@pytest.mark.slow
def test_a_run_whose_worker_was_killed_goes_on_in_the_same_checkout(project, client, told):
    """kill -9 of the worker and all that it started, as when a machine goes down; then the run is tried again."""
    project.nap(3)
    run = project.order()
    assert wait_for(lambda: list((project.root / ".rankwise/checkouts").glob(f"*-{run[:8]}/sft.pid")), 90)
    folder = project.checkout_of(run)
    time.sleep(0.5)
    os.killpg(project.worker.pid, signal.SIGKILL)
    project.worker.wait()
    for pid in everyone_below(run):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    project.start_worker()
    assert wait_for(lambda: not alive(int((folder / "sft.pid").read_text())))
    assert client.read_flow_run(run).state.is_running(), "nobody has told the server"
    assert end_of(client, run, 90).is_crashed() and "no sign of life" in client.read_flow_run(run).state.message
    project.prefect("flow-run", "retry", run)
    assert end_of(client, run).is_completed()
    assert project.checkout_of(run) == folder
    ran = (folder / "attempts.log").read_text().split()
    assert ran == ["prompts", "sft", "sft", "verdicts", "evaluate"], "a finished stage ran again"


def everyone_below(flow_run: str) -> list[int]:
    """Processes that have a flow run's id in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"PREFECT__FLOW_RUN_ID={flow_run}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_cancellation_reaches_the_stage_which_leaves_a_checkpoint(project, client):
    project.nap(60)
    run = project.order()
    assert wait_for(lambda: list((project.root / ".rankwise/checkouts").glob(f"*-{run[:8]}/prompts.pid")), 90)
    folder = project.checkout_of(run)
    time.sleep(0.5)
    project.prefect("flow-run", "cancel", run)
    assert end_of(client, run, 60).is_cancelled()
    assert (folder / "prompts.checkpoint").exists()
    assert wait_for(lambda: not everyone_below(run))


@pytest.fixture
def repository(tmp_path) -> Path:
    """The toy project under git, with data of a person's in data/source."""
    toy = Toy(tmp_path / "toy")
    source = toy.root / "data" / "source"
    source.mkdir(parents=True)
    (toy.root / ".gitignore").open("a").write("/data/source/?*\n!/data/source/*.dvc\n")
    (source / "linked").symlink_to(tmp_path)
    (source / "imported.csv").write_text("as it is today")
    (source / "imported.csv.dvc").write_text("outs: [{path: imported.csv, md5: 0123456789abcdef0123456789abcdef}]\n")
    toy.command("git", "add", "-A")
    toy.command("git", "commit", "-q", "-m", "a toy", **AUTHOR)
    return toy.root


def made(repository: Path, name: str, revision: str = "HEAD") -> Path:
    folder = repository / ".rankwise" / "checkouts" / name
    checkout._make(folder, repository / ".rankwise", str(repository), revision)
    return folder


def test_a_checkout_shares_what_is_costly_and_takes_data_of_the_commit_alone(repository, monkeypatch):
    monkeypatch.setenv("RANKWISE_REMOTE", "s3://bucket/path")
    (repository / "stage.py").write_text("an edit")
    folder = made(repository, "one")
    monkeypatch.chdir(folder)
    here = checkout.current()
    assert here.branch == "runs/one" and here.commit == git("rev-parse", "HEAD").stdout.strip()
    assert "1 file(s)" in here.note and "stage.py" in here.note and "an edit" not in Path("stage.py").read_text()
    assert (Path(".rankwise") / "stores").resolve() == repository / ".rankwise" / "stores"
    assert (Path("data") / "source" / "linked").resolve() == repository.parent
    assert not (Path("data") / "source" / "imported.csv").exists(), "its version is the commit's, for DVC to bring"
    from dvc.repo import Repo

    with Repo(".") as own:
        assert own.cache.local_cache_dir == str(repository / ".dvc" / "cache")
        assert own.config["remote"][own.config["core"]["remote"]]["url"] == "s3://bucket/path"
    assert git("status", "--porcelain").stdout == ""


def test_a_person_s_folder_is_no_checkout_of_a_run(repository, monkeypatch):
    monkeypatch.chdir(repository)
    assert checkout.current() is None
    with pytest.raises(UserError, match="use git to change it"):
        stages.begin(revision="main")


def test_an_unknown_revision_leaves_nothing_behind(repository):
    with pytest.raises(UserError, match="has no revision 'nowhere': name a branch, a tag or a commit"):
        made(repository, "one", "nowhere")
    assert list((repository / ".rankwise" / "checkouts").iterdir()) == []


def test_old_checkouts_go_but_none_that_holds_something_or_that_a_run_works_in(repository, monkeypatch):
    monkeypatch.setattr(checkout, "KEPT", 1)
    busy, done, waiting, forgotten, last, own = folders = [made(repository, name) for name in "abcdef"]
    for age, folder in enumerate(folders):
        at = time.time() - 1000 + age
        os.utime(folder / checkout.NOTE, (at, at))
    os.utime(forgotten / checkout.NOTE, (0, 0))
    for folder in (busy, done, last):
        (folder / checkout.DONE).touch()
    (busy.parent / ".cut-off").mkdir()
    with checkout._locked(busy / checkout.LOCK, 0):
        checkout._prune(busy.parent, keep=own)
    assert sorted(busy.parent.iterdir()) == [busy, waiting, last, own]


@pytest.mark.slow
def test_a_promotion_that_waits_for_a_person_holds_no_worker_and_goes_on_in_its_checkout(project, client):
    """What tasks.promote says is played here; the run, its end and its return are real."""
    flows = project.root / "flows"
    flows.unlink()
    shutil.copytree(ROOT / "flows", flows, ignore=shutil.ignore_patterns("__pycache__"))
    with open(flows / "promote.py", "a") as script:
        script.write(f"\n\n{PLAYED}")
    project.commit("a challenger")
    run = project.order("promote/promote", wait_hours=1)
    assert wait_for(lambda: client.read_flow_run(run).state.name == "Suspended", 90), client.read_flow_run(run).state
    assert wait_for(lambda: not everyone_below(run))
    said = client.resume_flow_run(run, run_input={"approve": True, "by": "Ada", "reason": "-- read them"})
    assert said.status.value == "ACCEPT", said
    assert wait_for(lambda: client.read_flow_run(run).state.is_completed(), 90), client.read_flow_run(run).state
    asked = (project.checkout_of(run) / "asked.log").read_text().splitlines()
    assert asked == ["", "", "--approve=Ada --reason=-- read them --versions=-,1"]


PLAYED = """
def _run_task(*words):
    with open("asked.log", "a") as log:
        log.write(" ".join(filter(None, words)) + "\\n")
    made = {"what": "promoted", "by": "Ada", "reason": "read", "at": "2026-11-28T10:00:00"} if any(words) else None
    return {
        "name": "rankwise-policy", "verdict": "promote", "why": "there is no champion", "champion": None, "checks": [],
        "challenger": {"version": "1", "md5": "b.dir", "commit": ""}, "decision": made,
        "pages": {"challenger": "http://m/1", "model": "http://m"},
    }
"""


def test_a_remote_beside_the_repository_is_the_same_folder_in_a_checkout(repository, monkeypatch):
    """DVC writes the path relative to .dvc, and a checkout lies deeper."""
    monkeypatch.delenv("RANKWISE_REMOTE", raising=False)
    Toy.command(SimpleNamespace(root=repository), "dvc", "remote", "add", "-d", "beside", "../storage")
    git("commit", "-qam", "a remote", where=repository)
    from dvc.repo import Repo

    with Repo(str(made(repository, "one"))) as own:
        assert Path(own.cloud.get_remote_odb().path).parts[: len(repository.parts)] == (
            *repository.parent.parts,
            "storage",
        )


def test_an_address_with_a_password_is_refused_and_not_repeated():
    with pytest.raises(UserError, match=r"git\.example\.com holds a user or a password") as refused:
        checkout._refuse_password("https://ann:s3cret@git.example.com/x.git")
    assert "s3cret" not in str(refused.value)
    checkout._refuse_password("ssh://git@git.example.com/x.git")


def test_a_repository_elsewhere_needs_a_home_for_what_runs_share(monkeypatch):
    monkeypatch.delenv("RANKWISE_HOME", raising=False)
    with pytest.raises(UserError, match="set RANKWISE_HOME to a folder that outlives the run"):
        checkout.shared_home("https://example.com/project.git")
    monkeypatch.setenv("RANKWISE_HOME", "/somewhere")
    assert checkout.shared_home("https://example.com/project.git") == Path("/somewhere")
