"""No secret is left behind: canaries in every place that holds one, and a search of all that runs leave.

What one client tells of its key is in test_server_judge.py, what services tell of their passwords in test_stack.py.
"""

from __future__ import annotations

import base64
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import pytest
from clones import Repository
from fault_server import FaultServer, Judging

from tasks import tracking_ui
from tasks.tracking import without_password
from tasks.tracking_worker import part_from_password

# One for each variable that may hold a secret in the environment of a run; without a server of its own, none is used.
CANARIES = {
    name: f"canary-{number:02d}-7d1f9c3b5a"
    for number, name in enumerate(
        (
            *(
                "RANKWISE_JUDGE_API_KEY",
                "RANKWISE_JUDGE_2_API_KEY",
                "RANKWISE_GOLD_API_KEY",
                "RANKWISE_TEACHER_API_KEY",
            ),
            *("RANKWISE_ROLLOUTS_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "PGPASSWORD"),
            *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PREFECT_API_KEY", "OPENAI_API_KEY"),
            *("RANKWISE_POSTGRES_PASSWORD", "RANKWISE_S3_SECRET", "RANKWISE_MLFLOW_PASSWORD"),
        )
    )
}
IN_ADDRESSES = {name: f"canary-{name}-4e8a6b" for name in ("tracking", "judge", "store", "origin")}
EVERY = [*CANARIES.values(), *IN_ADDRESSES.values()]


def forms(secret: str) -> set[bytes]:
    """As it is, as an address writes it, and inside the header of a password, at each of three offsets."""
    coded = {base64.b64encode(b"x" * n + secret.encode())[-(-n * 4 // 3) : -4] for n in range(3)}
    return {secret.encode(), urllib.parse.quote(secret, safe="").encode(), *coded}


def holders(folders: list[Path]) -> tuple[dict[str, list[str]], int, int]:
    """(files by the canary that they hold, how many files, how many bytes were searched)."""
    wanted = {form: secret for secret in EVERY for form in forms(secret)}
    found: dict[str, list[str]] = {}
    files = size = 0
    for path in (path for folder in folders for path in folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            files, size = files + 1, size + len(data)
            for secret in {secret for form, secret in wanted.items() if form in data}:
                found.setdefault(secret, []).append(str(path))
    return found, files, size


class Watch(threading.Thread):
    """Looks at the command lines of all processes of this machine until it is told to stop."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seen: set[bytes] = set()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    words = path.read_bytes()
                except OSError:
                    continue
                self.seen.add(words)

    def telling(self) -> list[bytes]:
        return [words for words in self.seen if any(form in words for one in EVERY for form in forms(one))]


def test_the_search_finds_a_canary_in_each_form(tmp_path):
    for number, form in enumerate(forms(EVERY[0])):
        (tmp_path / str(number)).write_bytes(b"before " + form + b" after")
    header = base64.b64encode(f"admin:{EVERY[1]}".encode())
    (tmp_path / "header").write_bytes(header)
    found, files, _ = holders([tmp_path])
    assert (
        found == {EVERY[0]: found[EVERY[0]], EVERY[1]: [str(tmp_path / "header")]} and files == len(forms(EVERY[0])) + 1
    )


@pytest.mark.parametrize(
    "address", ["https://me:SECRET@host:1/x", "http://SECRET@host/", "postgresql://a:p@SECRET@host/x"]
)
def test_an_address_that_is_shown_holds_no_user_and_no_password(address):
    said = without_password(f"cannot reach {address}; see https://docs/@x")
    assert "SECRET" not in said and "//host" in said and said.endswith("https://docs/@x")


def test_a_trackers_address_is_parted_from_its_password():
    given = {"MLFLOW_TRACKING_URI": "https://me:p%40ss@host:5000/x", "MLFLOW_TRACKING_PASSWORD": "another"}
    part_from_password(given)
    assert given == {
        "MLFLOW_TRACKING_URI": "https://host:5000/x",
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": "p@ss",  # as it was: what stands in an address wins
    }
    for store in ("sqlite:///a.db", "https://host", "postgresql://me:p@host/x"):
        part_from_password(kept := {"MLFLOW_TRACKING_URI": store})
        assert kept == {"MLFLOW_TRACKING_URI": store}


def test_the_address_of_mlflows_store_is_on_no_command_line(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:SECRET@127.0.0.1/mlflow")
    command, environment = tracking_ui.ui_command(5000)
    assert "SECRET" not in " ".join(command) and "SECRET" in environment["MLFLOW_BACKEND_STORE_URI"]
    monkeypatch.setattr("sys.argv", ["tasks.tracking", "ui", "--print"])
    assert tracking_ui.main() == 0 and "SECRET" not in capsys.readouterr().out


def test_the_settings_of_a_runs_checkout_are_for_this_user_alone(tmp_path):
    """They repeat the remotes of the repository's folder, with keys that may stand in a private file."""
    from dvc.repo import Repo

    from flows.checkout import _configure

    for name in ("theirs", "own"):
        (tmp_path / name).mkdir()
        Repo.init(str(tmp_path / name), no_scm=True).close()
    with Repo(str(tmp_path / "theirs")) as theirs, theirs.config.edit("local") as config:
        config["remote"]["store"] = {"url": "s3://bucket", "secret_access_key": "SECRET"}
        config["core"]["remote"] = "store"
    _configure(tmp_path / "own", tmp_path / "theirs", tmp_path / "cache")
    made = tmp_path / "own/.dvc/config.local"
    assert "SECRET" in made.read_text() and stat.S_IMODE(made.stat().st_mode) == 0o600


@pytest.mark.slow
def test_runs_that_succeed_and_fail_leave_no_secret_in_a_file_a_log_or_a_command_line(tmp_path):
    """A flow whose judge is right; then a key that is refused and quoted back, a server and a tracker that are away."""
    judge = {"kind": "server", "model": "judge", "rubric": "recipes/rubrics/helpfulness.md"}
    own = Repository(tmp_path / "clone", {"verdicts": {"judge": judge}, "reward_model": {"enabled": False}})
    own.command("git", "remote", "add", "origin", f"https://me:{IN_ADDRESSES['origin']}@127.0.0.1:9/x.git")
    environment = {
        **own.environment(),
        **CANARIES,
        "HOME": str(tmp_path / "home"),
        "RANKWISE_TRACKING": "on",
        "RANKWISE_RETRY_AFTER_S": "0.1 0.1",
        "RANKWISE_JUDGE_TIMEOUT": "5",
        "AWS_ACCESS_KEY_ID": "rankwise",
    }
    for name in [name for name in environment if name.startswith("PREFECT_API_URL")]:
        del environment[name]
    (tmp_path / "home").mkdir()
    said: list[str] = []

    def flow(*options: str, **more: str) -> int:
        done = subprocess.run(
            [sys.executable, "-m", "flows.align", "--target", "verdicts", *options],
            cwd=own.root,
            env={**environment, **more},
            capture_output=True,
            text=True,
            timeout=500,
        )
        said.append(done.stdout + done.stderr)
        return done.returncode

    watch = Watch()
    watch.start()
    with FaultServer(judge=Judging(), key=CANARIES["RANKWISE_JUDGE_API_KEY"], echo=True) as right:
        assert flow(RANKWISE_JUDGE_URL=right.url) == 0, said[-1][-3000:]
    with FaultServer(judge=Judging(), key="another", echo=True) as wrong:
        assert flow("--set", "verdicts.judge.rubric=recipes/rubrics/sentiment.md", RANKWISE_JUDGE_URL=wrong.url) == 2
    away = {
        "RANKWISE_JUDGE_URL": "http://127.0.0.1:9/v1",
        "MLFLOW_TRACKING_URI": f"http://me:{IN_ADDRESSES['tracking']}@127.0.0.1:9",
    }
    assert flow(**away) == 1
    assert flow(RANKWISE_JUDGE_URL=f"http://me:{IN_ADDRESSES['judge']}@127.0.0.1:9/v1") == 2
    store = f"postgresql://me:{IN_ADDRESSES['store']}@127.0.0.1:9/mlflow"
    ui = subprocess.Popen(
        [sys.executable, "-m", "tasks.tracking", "ui", "--port", "0"],
        cwd=own.root,
        env={**environment, "MLFLOW_TRACKING_URI": store},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    time.sleep(8)
    os.killpg(ui.pid, signal.SIGKILL)
    said.append(ui.communicate()[0])
    watch.done.set()
    watch.join()

    (tmp_path / "said").mkdir()
    for number, text in enumerate(said):
        (tmp_path / "said" / f"{number}.txt").write_text(text)
    found, files, size = holders([own.root, tmp_path / "home", tmp_path / "said"])
    kept = {str(own.root / ".git/config")}  # a person's own, written by the person
    left = {secret: [path for path in paths if path not in kept] for secret, paths in found.items()}
    print(f"{len(EVERY)} secrets, {files} files, {size / 1e6:.0f} MB, {len(watch.seen)} command lines")
    assert len(watch.seen) > 20 and files > 200 and any("[key]" in text or "accept the key" in text for text in said)
    assert {secret: paths for secret, paths in left.items() if paths} == {}
    assert watch.telling() == []
