"""The folder that a deployment's run works in: a checkout of its own, of a stated revision, over what runs share.

prefect.yaml names own_checkout as the step before each run. So two runs never fight over one working tree, a run is of
a commit and not of whatever lies in a folder, and nobody's edits are overwritten. Below the shared home
(RANKWISE_HOME; of a repository that is a folder here, its .rankwise):

    checkouts/2026-11-28-nightly-1a2b3c4d    one for each flow run; a retried run finds its own again
    stores, checkpoints, mlflow              shared by all, each a link in the checkout's own .rankwise
    cache                                    DVC's, unless the repository is a folder here and has one

DVC's remote is the one that RANKWISE_REMOTE names, or else the repository's own. What becomes of a run's results:
flows/exchange.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from flows.git import git, last_line
from rankwise.types import UserError
from tasks.tracking import home

NOTE = Path(".git") / "rankwise.json"  # in a checkout of a run, and nowhere else
LOCK = Path(".dvc") / "tmp" / "rankwise.lock"  # held by the run that works in a checkout; .rankwise may be shared
NONE = "RANKWISE_NO_CHECKOUT"  # why there is none
SHARED = ("stores", "checkpoints", "mlflow")
KEPT = 10  # checkouts that nobody works in; they are links into DVC's cache, so they weigh little


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """Where a run's checkout comes from and where its results go."""

    repository: str  # a folder or a URL
    revision: str  # as it was asked for
    commit: str  # what that was, 40 hex digits
    branch: str  # of the results
    note: str = ""  # what a person should know of it


def own_checkout(repository: str, revision: str) -> dict[str, str]:
    """Prefect's step before a run: make its checkout, or find that of an earlier attempt; returns {"directory": …}.

    The run's parameter `revision`, a branch, a tag or a commit, stands over the one given here; RANKWISE_REPOSITORY
    over the repository, for a worker on a machine that has it elsewhere.
    """
    try:
        folder = _find_or_make(os.environ.get("RANKWISE_REPOSITORY") or repository, revision)
    except UserError as error:
        # Raised here, it would be in the worker's log and not with the run: the flow itself says it (refuse_none).
        os.environ[NONE] = str(error)
        return {"directory": str(Path(__file__).parent.parent)}
    _enter(folder)
    return {"directory": str(folder)}


def refuse_none() -> None:
    """Raise UserError where this run was to have a checkout and has none."""
    if reason := os.environ.get(NONE):
        raise UserError(reason)


def current() -> Checkout | None:
    """The checkout that this process works in; None where the folder is a person's."""
    if not NOTE.exists():
        return None
    return Checkout(**json.loads(NOTE.read_text(encoding="utf-8")))


def _find_or_make(repository: str, revision: str) -> Path:
    from prefect.runtime import deployment, flow_run

    revision = flow_run.parameters.get("revision") or revision
    began = flow_run.scheduled_start_time
    shared = shared_home(repository)
    folder = shared / "checkouts" / f"{began:%Y-%m-%d}-{_slug(deployment.name or 'run')}-{str(flow_run.id)[:8]}"
    with _only_one(shared):
        if not (folder / NOTE).exists():
            _make(folder, shared, repository, revision)
        _prune(folder.parent, keep=folder)
    return folder


def shared_home(repository: str) -> Path:
    """The folder of what runs of a repository share on this machine."""
    if named := os.environ.get("RANKWISE_HOME"):
        return Path(named).resolve()
    if Path(repository).is_dir():
        return (Path(repository) / home()).resolve()
    raise UserError(
        f"{repository} is no folder of this machine, so it has no place for what runs share: set RANKWISE_HOME to a "
        "folder that outlives the run (row stores, checkpoints, checkouts, DVC's cache)"
    )


def _make(folder: Path, shared: Path, repository: str, revision: str) -> None:
    """Clone aside, then rename: a folder that is there is whole."""
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    cloned = git("clone", "--quiet", "--no-checkout", "--", repository, str(aside), check=False)
    if cloned.returncode != 0:
        raise UserError(f"no checkout of {repository}: {last_line(cloned.stderr)}")
    for name in (f"origin/{revision}", revision):
        found = git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", where=aside, check=False)
        if found.returncode == 0:
            break
    else:
        shutil.rmtree(aside)
        raise UserError(f"{repository} has no revision {revision!r}: name a branch, a tag or a commit")
    commit = found.stdout.strip()
    git("checkout", "--quiet", "--detach", commit, where=aside)
    made = Checkout(
        repository=repository,
        revision=revision,
        commit=commit,
        branch=f"runs/{folder.name}",
        note=_left_out(repository),
    )
    (aside / NOTE).write_text(json.dumps(asdict(made)) + "\n", encoding="utf-8")
    _share(aside, shared, repository)
    os.rename(aside, folder)


def _left_out(repository: str) -> str:
    """What is not in a checkout although a person sees it in the repository's folder."""
    if not Path(repository).is_dir():
        return ""
    changed = git("status", "--porcelain", "--untracked-files=no", where=repository, check=False).stdout.splitlines()
    if not changed:
        return ""
    first = ", ".join(line[3:] for line in changed[:3])
    return f"{len(changed)} file(s) of {repository} have changes that no commit has, so this run is without ({first})"


def _share(folder: Path, shared: Path, repository: str) -> None:
    """Links to what all runs share, DVC's cache and remote, and the data that a person has linked into data/source."""
    from dvc.repo import Repo

    for name in SHARED:
        (shared / name).mkdir(parents=True, exist_ok=True)
        (folder / ".rankwise").mkdir(exist_ok=True)
        (folder / ".rankwise" / name).symlink_to(shared / name)
    here = Path(repository).resolve() if Path(repository).is_dir() else None
    cache = str(shared / "cache")
    if here is not None:
        with Repo(str(here)) as theirs:
            cache = theirs.cache.local_cache_dir
        if (local := here / ".dvc" / "config.local").is_file():
            shutil.copy(local, folder / ".dvc" / "config.local")
        _link_data(here, folder)
    with Repo(str(folder)) as own, own.config.edit("local") as config:
        config["cache"]["dir"] = cache
        if remote := os.environ.get("RANKWISE_REMOTE"):
            config["remote"]["run"] = {"url": remote}
            config["core"]["remote"] = "run"


def _link_data(theirs: Path, own: Path) -> None:
    """Link what a person has put into data/source, but for what git or DVC has: that is as the commit says."""
    for path in (theirs / "data" / "source").glob("*"):
        mine = own / "data" / "source" / path.name
        if not mine.exists() and not mine.with_name(f"{path.name}.dvc").exists():
            mine.parent.mkdir(parents=True, exist_ok=True)
            mine.symlink_to(path.resolve())


def _enter(folder: Path) -> None:
    """From here on this process and its children are of the checkout: its code, its .rankwise."""
    os.environ["RANKWISE_HOME"] = str(folder / ".rankwise")
    os.environ["PREFECT_RUNNER_AUTO_INSTALL_DEPENDENCIES"] = "false"  # with uv at hand: no environment for each run
    sys.path.insert(0, str(folder))
    # This module was imported from where the worker is installed; the flow comes from the checkout.
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flows", "tasks", "rankwise")]:
        del sys.modules[name]


def _prune(checkouts: Path, *, keep: Path) -> None:
    """Remove the oldest checkouts that nobody works in."""
    folders = [path for path in checkouts.iterdir() if (path / NOTE).exists() and path != keep]
    for old in sorted(folders, key=lambda path: (path / NOTE).stat().st_mtime)[: -KEPT or None]:
        with contextlib.suppress(OSError), _locked(old / LOCK, fcntl.LOCK_NB):
            shutil.rmtree(old)


def _only_one(shared: Path) -> contextlib.AbstractContextManager[None]:
    """Two runs that begin at once make their checkouts one after the other."""
    return _locked(shared / "checkouts" / ".lock", 0)


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | how)
        yield


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
