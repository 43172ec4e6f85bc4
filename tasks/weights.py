"""The weights of a registered version as a folder: `python -m tasks.weights VERSION FOLDER`.

    python -m tasks.weights champion exported        # then: AutoModelForCausalLM.from_pretrained("exported")
    python -m tasks.weights 3 exported

A version points at its weights by DVC's md5 of their folder, so whatever is found is known to be the right one. They
are looked for, in this order: in RANKWISE_POLICY, a folder that has them; where the project makes them; among those
found earlier (.rankwise/models); in DVC's cache; in MLflow, where register.log_weights was on; and by `dvc get` at the
version's commit, which asks the DVC remote. VERSION is a number or an alias; run it in the project's root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from rankwise import json_text
from rankwise.types import UserError
from tasks import lineage, params, tracking

DVC_S = 3600.0  # how long DVC may fetch weights
MD5 = re.compile(r"[0-9a-f]{32}\.dir")  # of a folder, as DVC writes it

# Puts a copy of the weights that is kept elsewhere into a new folder; False where there is none.
Download = Callable[[Path], bool]


def find(md5: str, path: Path, *, revisions: Sequence[str] = (), download: Download | None = None) -> Path:
    """A folder with the weights of this md5, as DVC counts it ("….dir").

    Args:
        path: where the project makes them.
        revisions: of git, at which DVC may know them, the likeliest first.
        download: where else a copy may be.

    Raises UserError that names what was tried.
    """
    if not MD5.fullmatch(md5):  # from the registry, and a part of paths from here on
        raise UserError(f"the version's md5 is {md5!r}, and 32 hex digits and .dir were expected: register it again")
    made = home() / md5.removesuffix(".dir")
    given = os.environ.get("RANKWISE_POLICY")
    tried = []
    for folder in filter(None, [given and Path(given), path, made]):
        if not (folder / "config.json").is_file():
            tried.append(f"{folder}: not there")
        elif (other := lineage.md5_of(folder)) == md5:
            return folder
        else:
            tried.append(f"{folder}: other weights (md5 {other})")
    ways = {
        "DVC's cache": lambda aside: _from_cache(md5, aside),
        "MLflow": download or (lambda aside: False),
    }
    for one in revisions:
        ways[f"`dvc get` at {one}"] = lambda aside, one=one: _from_revision(path, one, aside)
    for name, way in ways.items():
        with _aside(made) as aside:
            if not way(aside):
                tried.append(f"{name}: nothing")
            elif (other := lineage.md5_of(aside)) == md5:
                shutil.rmtree(made, ignore_errors=True)
                os.replace(aside, made)
                return made
            else:
                tried.append(f"{name}: other weights (md5 {other})")
    raise UserError(
        f"the weights of this version (md5 {md5}) are not to be had: {'; '.join(tried)}. Run this in the project's "
        f"root after `git checkout {next(iter(revisions), 'COMMIT')} dvc.lock && dvc pull {path}`, or set "
        "RANKWISE_POLICY to a folder that has them"
    )


def revisions_of(commit: str, branch: str) -> list[str]:
    """Where to look for a version's dvc.lock: the branch that its run left, here or where it was cloned from, and the
    commit that it was made of, whose dvc.lock knows it only where a person has committed it."""
    branches = [branch, f"origin/{branch}"] if branch else []
    return [*branches, *filter(None, [commit.removesuffix("+dirty")])]


def home() -> Path:
    """Where weights lie that were found elsewhere than in the project's own folders, by md5."""
    return tracking.home() / "models"


def of_version(registry: tracking.Registry, name: str, version: dict[str, Any]) -> Path:
    """The weights of a registered version; raises UserError."""

    def download(aside: Path) -> bool:
        asked = {"name": name, "version": version["version"], "folder": str(aside.absolute())}
        return registry.ask("download", patience_s=tracking.PATIENCE_COPY_S, **asked)["copied"]

    tags = version["tags"]
    path = Path(tags.get("policy_path", "models/policy"))
    revisions = revisions_of(tags.get("git.commit", ""), tags.get("git.branch", ""))
    return find(tags["policy_md5"], path, revisions=revisions, download=download)


def pick(found: dict[str, Any], wanted: str, name: str) -> dict[str, Any]:
    """A version by its number or its alias; raises UserError with those that there are."""
    number = found["aliases"].get(wanted.removeprefix("@"), wanted)
    for version in found["versions"]:
        if version["version"] == number:
            return version
    numbers = ", ".join(version["version"] for version in reversed(found["versions"]))
    aliases = ", ".join(f"{alias} ({number})" for alias, number in sorted(found["aliases"].items())) or "none"
    raise UserError(f"{name} has no version or alias {wanted!r} (versions: {numbers}; aliases: {aliases})")


def _from_cache(md5: str, aside: Path) -> bool:
    """The folder put together from the files of DVC's cache, linked where that works: they are read-only there."""
    where = _dvc("cache", "dir")
    cache = Path(where or "") / "files" / "md5"
    listing = _object(cache, md5)
    if where is None or not listing.is_file():
        return False
    mend = "take it out of DVC's cache, and fetch it again: dvc pull"
    entries = json_text.read(listing, mend)
    with json_text.as_written(listing, mend):
        files = [(_object(cache, _md5(entry["md5"])), _inside(aside, entry["relpath"])) for entry in entries]
    for source, target in files:
        if not source.is_file():
            return False
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(source, target)
        except OSError as error:  # a file that is listed twice, or as a folder too; a disk that is full
            raise UserError(
                f"{listing}: {target.name[:60]} cannot be put into {aside} ({error.strerror}); {mend}"
            ) from None
    return True


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _md5(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{3,32}", text):
        raise ValueError(f"{text[:60]!r} is no md5")
    return text


def _inside(folder: Path, name: str) -> Path:
    os.fsencode(name)  # or no name of a file can be written so
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
        raise ValueError(f"names a file outside its folder, {name[:60]!r}")
    return folder / name


def _object(cache: Path, md5: str) -> Path:
    return cache / md5[:2] / md5[2:]


def _from_revision(path: Path, revision: str, aside: Path) -> bool:
    """By DVC from this repository as it was at a revision, out of its remote if need be."""
    if path.is_absolute():
        return False
    # With =, and after --: what a version says of itself is no option of DVC's.
    return _dvc("get", f"--rev={revision}", f"--out={aside}", "--", ".", str(path)) is not None


def _dvc(*words: str) -> str | None:
    """What a command of DVC prints; None where it fails, or there is no DVC or no project of its."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *words], capture_output=True, text=True, timeout=DVC_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@contextlib.contextmanager
def _aside(made: Path) -> Iterator[Path]:
    """A place beside a folder that is to be made, cleared in the end; whoever finds the folder finds it whole."""
    made.parent.mkdir(parents=True, exist_ok=True)
    aside = made.with_name(f".{made.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def export(folder: Path, target: Path) -> None:
    """Copy a model's folder to a new one, whole or not at all; raises UserError where there is something already."""
    if target.exists():
        raise UserError(f"{target} is there already; name a folder that is not, or remove it")
    with _aside(target) as aside:
        shutil.copytree(folder, aside, ignore=shutil.ignore_patterns(".gitignore"), copy_function=shutil.copyfile)
        os.replace(aside, target)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", help="a version's number, or an alias such as champion")
    parser.add_argument("folder", type=Path, help="a new folder for transformers to load")
    parser.add_argument("--name", help="the registered model (register.name of params.yaml)")
    arguments = parser.parse_args(argv)
    try:
        name = arguments.name or params.read_yaml(Path("params.yaml"))["register"]["name"]
        with tracking.registry() as registry:
            version = pick(registry.ask("versions", name=name), arguments.version, name)
            folder = of_version(registry, name, version)
        export(folder, arguments.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{name} version {version['version']}: {arguments.folder} (from {folder})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
