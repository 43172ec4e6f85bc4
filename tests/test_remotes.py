"""Laws of versions: what is pushed can be pulled, a finished run is restored, not computed; data from outside is seen.

The S3-compatible store is rclone's, on loopback, over a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from clones import QUIET, Repository
from conftest import Toy

from flows.server import free_port

KEYS = {
    "AWS_ACCESS_KEY_ID": "rankwise",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    # rclone repeats a file's checksum with a part of the file (docs/versioning.md)
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> Iterator[str]:
    """The URL of a bucket, while the environment says where it is and with which keys."""
    folder, port = tmp_path_factory.mktemp("store"), free_port()
    (folder / "bucket").mkdir()
    keys = f"{KEYS['AWS_ACCESS_KEY_ID']},{KEYS['AWS_SECRET_ACCESS_KEY']}"
    rclone = [Path(sys.executable).parent / "rclone", "--config", os.devnull, "serve", "s3", folder]
    with (
        subprocess.Popen(
            [*rclone, "--addr", f"127.0.0.1:{port}", "--auth-key", keys],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            for name, value in {**QUIET, **KEYS, "AWS_ENDPOINT_URL": url}.items():
                patch.setenv(name, value)
            wait_until(lambda: answers(url), seconds=30)
            yield "s3://bucket"
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def done(tmp_path_factory, bucket) -> Toy:
    """A toy project after one whole run, committed. Copy it, do not change it."""
    toy = Toy(tmp_path_factory.mktemp("done") / "toy")
    graph = toy.root / "dvc.yaml"  # an output that git keeps would leave its stage without a run cache
    graph.write_text(graph.read_text().replace(": {cache: false}", ""))
    toy.command("dvc", "repro")
    commit(toy.root)
    return toy


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Repository:
    """The project with the finished tiny run in it, known to DVC, which computed nothing. Copy it, do not change it."""
    made = Repository(tmp_path_factory.mktemp("recorded") / "clone")
    finished = tiny.finished(tmp_path_factory.getbasetemp())
    for name in (*tiny.MADE, ".rankwise"):
        shutil.copytree(finished.root / name, made.root / name, dirs_exist_ok=True, symlinks=True)
    made.command("dvc", "commit", "--force", "--quiet")
    commit(made.root)
    return made


@pytest.fixture
def repository(recorded, tmp_path) -> Repository:
    return Repository.at(shutil.copytree(recorded.root, tmp_path / "clone", symlinks=True))


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:  # it wants a signature
        return True
    except OSError:
        return False
    return True


def wait_until(met, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.2)


def commit(root: Path) -> None:
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    subprocess.run(["git", "commit", "-q", "-m", "state"], cwd=root, check=True, env={**os.environ, **QUIET})


def clone(root: Path, to: Path) -> Path:
    """What another machine has: git's files and no more."""
    subprocess.run(["git", "clone", "-q", root, to], check=True)
    return to


# Remotes


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_fresh_clone_with_the_run_cache_computes_nothing(done, bucket, tmp_path, kind):
    """Not even where dvc.lock is lost: the run cache knows which inputs gave which outputs."""
    toy = done.copy(tmp_path / "toy")
    toy.command("dvc", "remote", "add", "--default", "storage", str(tmp_path / "r") if kind == "folder" else bucket)
    commit(toy.root)
    toy.command("dvc", "push", "--run-cache")
    other = object.__new__(Toy)
    other.root = clone(toy.root, tmp_path / "other")
    other.command("dvc", "pull", "--run-cache")
    (other.root / "dvc.lock").unlink()
    other.command("dvc", "repro")
    assert other.attempts() == []
    assert (other.root / "dvc.lock").read_bytes() == (toy.root / "dvc.lock").read_bytes()
    assert (other.root / "evaluate.txt").read_text() == "evaluate"


def test_repro_pulls_by_itself_when_asked(done, bucket, tmp_path):
    toy = done.copy(tmp_path / "toy")
    toy.command("dvc", "remote", "add", "--default", "storage", f"{bucket}/pulled")
    commit(toy.root)
    toy.command("dvc", "push", "--run-cache")
    other = object.__new__(Toy)
    other.root = clone(toy.root, tmp_path / "other")
    (other.root / "dvc.lock").unlink()
    other.command("dvc", "repro", "--pull")
    assert other.attempts() == []


def test_without_keys_one_line_says_so(done, bucket, tmp_path, monkeypatch):
    toy = done.copy(tmp_path / "toy")
    toy.command("dvc", "remote", "add", "--default", "storage", f"{bucket}/x")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    with pytest.raises(subprocess.CalledProcessError) as failed:
        toy.command("dvc", "push")
    said = failed.value.stderr.decode()
    assert "credentials" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_file_of_several_parts_comes_back_whole(done, bucket, tmp_path):
    """Above 100 MB a file goes up in parts, above 50 MB it comes down in parts."""
    toy = done.copy(tmp_path / "toy")
    with open(toy.root / "weights", "wb") as file:
        for part in range(7):
            file.write(hashlib.sha256(bytes([part])).digest() * (2**24 // 32))
    digest = hashlib.md5((toy.root / "weights").read_bytes()).hexdigest()
    toy.command("dvc", "remote", "add", "--default", "storage", f"{bucket}/parts")
    toy.command("dvc", "add", "weights")
    toy.command("dvc", "push", "weights.dvc")
    (toy.root / "weights").unlink()
    shutil.rmtree(toy.root / ".dvc/cache")
    toy.command("dvc", "pull", "weights.dvc")
    assert hashlib.md5((toy.root / "weights").read_bytes()).hexdigest() == digest


@pytest.mark.slow
def test_another_machine_has_the_whole_run_from_the_store(repository, bucket, tmp_path):
    repository.command("dvc", "remote", "add", "--default", "storage", f"{bucket}/run")
    commit(repository.root)
    repository.command("dvc", "push")
    other = Repository.at(clone(repository.root, tmp_path / "other"))
    other.command("dvc", "pull")
    said = other.command("dvc", "repro")
    assert other.ran(said) == [] and "up to date" in said
    assert (other.root / "models/policy/model.safetensors").exists()
    assert other.command("git", "status", "--porcelain").strip() == ""


# Data from outside


@pytest.mark.slow
def test_an_import_below_data_source_is_seen_and_its_update_makes_stages_stale(repository, tmp_path):
    sets = Toy.__new__(Toy)
    sets.root = tmp_path / "sets"
    sets.root.mkdir()
    sets.command("git", "init", "-q", ".")
    sets.command("dvc", "init", "-q")
    for version in ("v1", "v2"):
        (sets.root / "pairs.jsonl").write_text(json.dumps({"prompt": version, "chosen": "a", "rejected": "b"}))
        sets.command("dvc", "add", "pairs.jsonl")
        commit(sets.root)
        sets.command("git", "tag", version)

    repository.command("dvc", "import", "--rev", "v1", str(sets.root), "pairs.jsonl", "-o", "data/source/pairs.jsonl")
    assert "data/source/pairs.jsonl.dvc" in repository.command("git", "status", "--porcelain")
    assert "data/source/pairs.jsonl" in repository.command("dvc", "dag", "--mermaid")
    repository.command("dvc", "commit", "--force", "--quiet", "prompts")
    assert "up to date" in repository.command("dvc", "status", "prompts")
    repository.command("dvc", "update", "--rev", "v2", "data/source/pairs.jsonl.dvc")
    assert "data/source" in repository.command("dvc", "status", "prompts")


# Links


@pytest.mark.slow
def test_no_stage_writes_into_a_file_that_is_there(tmp_path_factory, tmp_path):
    """Outputs are links into DVC's cache: written in place, the cache would hold other bytes than its names say."""
    project = tiny.finished(tmp_path_factory.getbasetemp()).copy(tmp_path / "copy")
    before = project.tree()
    for name in before:
        (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(project.root / name, tmp_path / "cache" / name)
    project.change({"prompts": {"seed": 7}})
    project.run_all()
    assert {name for name, digest in project.tree().items() if before.get(name) != digest} >= {
        "models/policy/model.safetensors",
        "data/verdicts.parquet",
        "reports/dpo/plots/curves.csv",
        "reports/evaluate/metrics.json",
    }
    linked = {name: hashlib.md5((tmp_path / "cache" / name).read_bytes()).hexdigest() for name in before}
    assert {name for name in before if linked[name] != before[name]} == set()


# Experiments


@pytest.mark.slow
def test_two_experiments_of_the_queue_run_at_once_and_share_what_is_kept_by_row(repository, monkeypatch):
    kept = repository.root / ".rankwise"
    monkeypatch.setenv("RANKWISE_HOME", str(kept))
    stores = {path.name: path.stat().st_size for path in (kept / "stores").iterdir()}
    repository.command("dvc", "exp", "run", "--queue", "-n", "low", "-S", "dpo.beta=0.05")
    repository.command("dvc", "exp", "run", "--queue", "-n", "high", "-S", "dpo.beta=0.5")
    repository.command("dvc", "queue", "start", "-j", "2")
    states = lambda: [line.split()[-1] for line in repository.command("dvc", "queue", "status").splitlines()[1:3]]
    with contextlib.ExitStack() as stack:
        stack.callback(repository.command, "dvc", "queue", "stop", "--kill")
        wait_until(lambda: not {"Queued", "Running"} & set(states()), seconds=400)
    assert states() == ["Success", "Success"], [repository.command("dvc", "queue", "logs", n) for n in ("low", "high")]
    assert stores.keys() <= {path.name for path in (kept / "stores").iterdir()}
    repository.command("dvc", "exp", "apply", "high")
    assert json.loads((repository.root / "reports/dpo/metrics.json").read_text())["beta"] == 0.5
    assert "0.05" in repository.command("dvc", "params", "diff", "low", "high")
    assert "answers of models/sft" not in repository.command("dvc", "queue", "logs", "high")
