"""What a run in a checkout of its own takes from others, and what it leaves where they find it.

It begins with what its revision names and this machine lacks: `dvc pull`. In the end data and models go to DVC's
remote, where there is one, and with them the run cache, from which another machine takes a stage's result instead of
running it. params.yaml and dvc.lock become a commit on the branch runs/NAME of the repository, so `git checkout` of it
and `dvc pull` bring the whole run back.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from flows import checkout
from flows.git import git, last_line

# What a run may change of what git tracks.
RESULTS = ("params.yaml", "dvc.lock", "sweeps/params.yaml", "sweeps/dvc.lock")


def remote() -> str | None:
    """The name of DVC's default remote here."""
    from dvc.repo import Repo

    with Repo(".") as repo:
        return repo.config["core"].get("remote") or None


def begin_with() -> bool:
    """Bring what this run's revision names, imported data above all, if it works in a checkout: from DVC's remote, or
    where there is none from this machine's cache. Returns whether there is a remote that answers.

    One that is away stops nothing: what is not here is computed, or missed by the stage that needs it.
    """
    if checkout.current() is None:
        return False
    verb = "checkout" if remote() is None else "pull"
    done, logger = _dvc(verb, "--allow-missing"), get_run_logger()
    if done.returncode == 0:
        logger.info("dvc %s: %s", verb, last_line(done.stdout, "nothing to bring").lower())
        return verb == "pull"
    logger.warning("dvc %s: %s; the run goes on with what is here", verb, last_line(done.stderr))
    return False


def give_away(title: str) -> str:
    """Publish what this run made, if it works in a checkout of its own; returns what failed, "" where nothing did."""
    if checkout.current() is None:
        return ""
    state = publish(title, return_state=True)
    return "" if state.is_completed() else f"publishing failed: {state.message}"


@task(
    name="publish",
    task_run_name="publish",
    persist_result=False,
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[10, 60],
)
def publish(title: str) -> State:
    """Push data and the commit; the state's message says where they are. What could not be pushed stays here, whole.

    Raises RuntimeError where a remote or the repository takes nothing.
    """
    own = checkout.current()
    assert own is not None, "a person's folder is for the person to push"
    logger, said = get_run_logger(), []
    if remote() is not None:
        said.append(f"data in the remote: {_push_data().lower()}")
    if (commit := _commit(title)) is not None:
        pushed = git("push", "--quiet", "origin", f"HEAD:refs/heads/{own.branch}", check=False)
        if pushed.returncode != 0:
            raise RuntimeError(f"git push of {own.branch}: {last_line(pushed.stderr)}; the commit is in {Path.cwd()}")
        said.append(f"branch {own.branch} at {commit}")
    message = "; ".join(said) or "nothing has changed"
    logger.info("%s", message)
    return Completed(message=message)


def _push_data() -> str:
    done = _dvc("push", "--run-cache")
    if done.returncode != 0:
        raise RuntimeError(f"dvc push: {last_line(done.stderr)}; the data are in this machine's cache")
    return last_line(done.stdout)


def _dvc(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "flows.guarded_dvc", *words], capture_output=True, text=True)


def _commit(title: str) -> str | None:
    """Commit what the run has changed; returns HEAD's short name, None where it is the revision that was asked for."""
    git("add", "--", *[path for path in RESULTS if Path(path).exists()])
    if git("diff", "--cached", "--quiet", check=False).returncode != 0:
        known = git("config", "user.email", check=False).returncode == 0
        nobody = [] if known else ["-c", "user.name=rankwise", "-c", "user.email=rankwise@localhost"]
        git(*nobody, "-c", "commit.gpgsign=false", "commit", "--quiet", "--no-verify", "-m", title)
    own = checkout.current()
    head = git("rev-parse", "HEAD").stdout.strip()
    return None if own is None or head == own.commit else head[:10]
