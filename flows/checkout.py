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
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flows.git import git, last_line
from rankwise import json_text
from rankwise.types import UserError
from tasks.tracking import home

NOTE = Path(".git") / "rankwise.json"  # in a checkout of a run, and nowhere else
LOCK = Path(".dvc") / "tmp" / "rankwise.lock"  # held by the run that works in a checkout; .rankwise may be shared
NONE = "RANKWISE_NO_CHECKOUT"  # why there is none
SHARED = ("stores", "checkpoints", "mlflow")
DONE = Path(".git") / "rankwise.done"  # all that the run made is elsewhere too
KEPT = 10  # checkouts of runs that are done; they are links into DVC's cache, so they weigh little
KEPT_DAYS = 30  # those of runs that failed, wait for a person or could not publish, since somebody last worked there


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
    except (UserError, OSError) as error:
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
    mend = "remove this checkout and run the deployment again"
    found = json_text.read(NOTE, mend)
    with json_text.as_written(NOTE, mend):
        return Checkout(**{name: _text(value) for name, value in found.items()})


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _find_or_make(repository: str, revision: str) -> Path:
    from prefect.runtime import deployment, flow_run

    _refuse_password(repository)
    revision = flow_run.parameters.get("revision") or revision
    began = flow_run.scheduled_start_time
    shared = shared_home(repository)
    folder = shared / "checkouts" / f"{began:%Y-%m-%d}-{_slug(deployment.name or 'run')}-{str(flow_run.id)[:8]}"
    with _only_one(shared):
        if not (folder / NOTE).exists():
            _make(folder, shared, repository, revision)
        (folder / NOTE).touch()
        (folder / DONE).unlink(missing_ok=True)
        _prune(folder.parent, keep=folder)
    return folder


def finish() -> None:
    """Say that nothing is in this run's checkout alone; it may go when others need the room."""
    if current() is not None:
        DONE.touch()


def _refuse_password(repository: str) -> None:
    """It would be shown with each run, and kept in each checkout."""
    parts = urlsplit(repository)
    if parts.scheme in ("http", "https") and parts.username is not None:
        raise UserError(
            f"the repository's address at {parts.hostname} holds a user or a password: give git a credential helper "
            "instead, and name the address without them"
        )


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
    for name in (f"origin/{revision}", revision) if not revision.startswith("-") else ():
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
    from dvc.exceptions import DvcException

    (folder / ".rankwise").mkdir(exist_ok=True)
    for name in SHARED:
        (shared / name).mkdir(parents=True, exist_ok=True)
        (folder / ".rankwise" / name).symlink_to(shared / name)
    here = Path(repository).resolve() if Path(repository).is_dir() else None
    if here is not None:
        _link_data(here, folder)
    try:
        _configure(folder, here, shared / "cache")
    except DvcException as error:
        raise UserError(f"DVC cannot be set up in a checkout of {repository}: {error}") from None


def _configure(folder: Path, here: Path | None, cache: Path) -> None:
    """DVC's local settings of a checkout: cache and remotes of the repository's folder, where there is one."""
    from dvc.repo import Repo

    local: dict[str, Any] = {"cache": {"dir": str(cache)}, "core": {}, "remote": {}}
    if here is not None:
        with Repo(str(here)) as theirs:
            # As they stand there: a remote's relative path means another folder here.
            local["cache"]["dir"] = theirs.cache.local_cache_dir
            local["remote"] = {name: dict(remote) for name, remote in theirs.config["remote"].items()}
            local["core"]["remote"] = theirs.config["core"].get("remote")
    if remote := os.environ.get("RANKWISE_REMOTE"):
        local["remote"]["run"], local["core"]["remote"] = {"url": remote}, "run"
    with Repo(str(folder)) as own:
        _refuse_relative(own, local)
        with own.config.edit("local") as config:
            for section, values in local.items():
                config[section] |= {name: value for name, value in values.items() if value}
        # A remote's key may come from a file that its owner alone can read.
        os.chmod(own.config.files["local"], 0o600)


def _refuse_relative(own: Any, local: dict[str, Any]) -> None:
    """A remote that is a path beside the repository is nowhere for a clone of a URL."""
    name = local["core"].get("remote") or own.config["core"].get("remote")
    if name and name not in local["remote"]:
        url = own.config["remote"].get(name, {}).get("url", "")
        if Path(own.root_dir).parent in Path(url).parents:
            raise UserError(
                f"DVC's remote {name!r} is a path beside the repository, which is no folder here: set RANKWISE_REMOTE"
            )


def _link_data(theirs: Path, own: Path) -> None:
    """Link what a person has put into data/source, but for what git or DVC has: that is as the commit says."""
    for path in (theirs / "data" / "source").glob("[!.]*"):
        if path.suffix == ".dvc":
            continue
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
    """Remove the oldest checkouts that are done with, and what a clone that was cut off has left."""
    for aside in checkouts.glob(".*/"):
        shutil.rmtree(aside, ignore_errors=True)
    at = {
        path: (path / NOTE).stat().st_mtime for path in checkouts.iterdir() if (path / NOTE).exists() and path != keep
    }
    done = sorted((path for path in at if (path / DONE).exists()), key=at.__getitem__)
    forgotten = [path for path, when in at.items() if path not in done and when < time.time() - KEPT_DAYS * 86400]
    for old in done[: -KEPT or None] + forgotten:
        with contextlib.suppress(OSError), _locked(old / LOCK, fcntl.LOCK_NB):
            # Its name first: half a checkout must not be taken for a whole one.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}")))


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
