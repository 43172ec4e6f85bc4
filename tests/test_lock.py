"""Laws of the lock: one set of versions, a hash for each, nothing beside it, no file with another hash."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from infra import lock

ROOT = Path(__file__).parent.parent
VERSIONS, HASHED = lock.VERSIONS.read_text(), lock.HASHED.read_text()


def locked() -> dict[str, set[str]]:
    """Versions by name; several where platforms differ."""
    found: dict[str, set[str]] = {}
    for pin in lock.pins(HASHED):
        one = Requirement(pin)
        found.setdefault(canonicalize_name(one.name), set()).add(str(one.specifier).removeprefix("=="))
    return found


def needed(name: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """Names of what a distribution that is installed here needs, with what that needs, and so on."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(canonicalize_name(name), extras)]
    while waiting:
        if (one := waiting.pop()) in seen:
            continue
        seen.add(one)
        # The lines alone: parsing the whole of three hundred such files, README and all, takes ten times as long.
        own = importlib.metadata.distribution(one[0])
        about = own.read_text("METADATA") or own.read_text("PKG-INFO")
        for text in re.findall(r"^Requires-Dist: (.+)$", about.partition("\n\n")[0], re.M):
            if "extra" in text and not one[1]:
                continue
            wanted = Requirement(text)
            if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in ("", *one[1])):
                waiting.append((canonicalize_name(wanted.name), frozenset(wanted.extras)))
    return {name for name, _ in seen}


def test_both_files_name_the_same_versions_and_every_one_has_a_hash():
    assert sorted(lock.pins(HASHED)) == sorted(lock.pins(VERSIONS))
    found = lock.hashes(HASHED)
    assert len(found) == len(lock.pins(HASHED)) and min(map(len, found.values())) >= 1
    assert HASHED.count("--hash=") == sum(map(len, found.values()))


def test_the_lock_names_no_host_and_no_file():
    for text in (HASHED, VERSIONS):
        assert not re.search(r"https?:|^-|--(extra-)?index|--find-links|@ ", text.replace("-e '.", ""), re.M)


def test_a_file_from_elsewhere_is_known_by_its_hash():
    found = lock.hashes(HASHED)
    for pin, files in lock.ELSEWHERE.items():
        assert set(files.values()) < set(found[pin]), "others are the package index's own"


def test_nothing_is_installed_that_the_lock_does_not_name():
    """A name without a hash would be taken as it comes."""
    strange = {}
    for name in needed("rankwise", frozenset({"dev"})) - {"rankwise"}:
        version = importlib.metadata.version(name).partition("+")[0]
        if version not in locked().get(name, set()):
            strange[name] = version
    assert strange == {}


def test_every_installation_is_held_against_the_hashes():
    for name in ("Makefile", "infra/docker/Dockerfile"):
        installs = [
            line for line in (ROOT / name).read_text().splitlines() if re.search(r"pip\)? install |PIP\) install", line)
        ]
        assert installs
        for line in installs:
            held = re.search(r"--require-hashes|\$\(HELD\)|-c /constraints\.hashed\.txt|--no-deps -e|pip-audit", line)
            assert held, f"{name}: {line}"


@pytest.fixture
def wheels(tmp_path) -> Path:
    """A folder with one wheel, and a project beside it that needs it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "rankwise_toy-1.0-py3-none-any.whl", "w") as wheel:
        info = "rankwise_toy-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: rankwise-toy\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "p"\nversion = "1"\ndependencies = ["rankwise-toy"]\n[tool.setuptools]\npackages = []\n'
    )
    return folder


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_an_editable_project_installs_and_a_file_with_another_hash_does_not(right, wheels, tmp_path):
    """As the Makefile asks for it, with pip as the lock has it."""
    if Version(importlib.metadata.version("pip")) < Version("26.3"):
        pytest.skip("the pip of this environment is older than the lock's: make environment")
    (wheel,) = wheels.iterdir()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest() if right else "0" * 64
    (tmp_path / "lock.txt").write_text(f"rankwise-toy==1.0 --hash=sha256:{digest}\n")
    held = [
        "--no-require-hashes",
        "--constraint",
        str(tmp_path / "lock.txt"),
        "--no-index",
        "--find-links",
        str(wheels),
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--dry-run",
            "--no-build-isolation",
            *held,
            "-e",
            str(tmp_path / "project"),
        ],
        env={**os.environ, "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == right, done.stdout + done.stderr
    assert ("Would install" in done.stdout) == right and ("DO NOT MATCH THE HASHES" in done.stderr) != right
