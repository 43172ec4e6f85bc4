"""The lock with hashes: constraints.txt again, and beside each version the SHA-256 of every file that it may come as.

    python -m infra.lock              # write constraints.hashed.txt anew from constraints.txt
    python -m infra.lock --versions   # print new versions for constraints.txt, after a change of a range

constraints.txt is what people read and change; constraints.hashed.txt is made of it and is what `make environment` and
the images install by: a file with another hash is refused. It needs the resolver uv on PATH (`pip install uv`, into an
environment of its own) and the package index; it takes seconds, and changes no version unless asked to.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS, HASHED = ROOT / "constraints.txt", ROOT / "constraints.hashed.txt"

# What the installation itself needs, beside what pyproject.toml asks for: an installer that takes hashes of a
# constraints file for what they are (pip below 26.3 either checks none or refuses a project's own folder), and the
# builder of the project and of what comes as source alone.
INSTALLERS = ("pip>=26.3", "setuptools>=77")

# Files that the package index does not have and that satisfy a version of the lock all the same.
ELSEWHERE = {
    "torch==2.13.0": {
        # PyTorch's own index of CPU builds: a tenth of the size. Others of its files are not known here: name theirs.
        "2.13.0+cpu, CPython 3.11, Linux, x86_64": "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
    }
}
HEAD = """\
# Made of constraints.txt by `python -m infra.lock`; do not edit. What `make environment` installs is held against it.
"""


def pins(text: str) -> list[str]:
    """The lines NAME==VERSION of a lock, with their markers and without their hashes."""
    lines = (re.sub(r"\s*\\$", "", line) for line in text.splitlines())
    return [line for line in lines if re.match(r"[a-z0-9]", line)]


def hashes(text: str) -> dict[str, list[str]]:
    """Digests by pin, in their order."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if named := pins(line):
            of = found[named[0]] = []
        elif digest := re.fullmatch(r"    --hash=sha256:([0-9a-f]{64})(?: \\)?", line):
            of.append(digest[1])
    return found


def compile_(*options: str) -> str:
    """What uv makes of pyproject.toml on every platform."""
    words = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--all-extras"]
    words += ["--no-annotate", "--no-header", "--no-emit-index-url", "--no-emit-find-links", *options]
    done = subprocess.run(
        [*words, "pyproject.toml", "-"], cwd=ROOT, input="\n".join(INSTALLERS), capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"error: uv: {done.stderr.strip()}")
    return done.stdout


def with_elsewhere(text: str) -> str:
    """The lock with what is known of files from elsewhere, each under its version."""
    for pin, files in ELSEWHERE.items():
        if text.count(f"\n{pin} \\\n") != 1:
            raise SystemExit(f"error: {pin} is not in constraints.txt: bring ELSEWHERE of infra/lock.py up to date")
        own = "".join(f"    --hash=sha256:{digest} \\\n" for digest in files.values())
        text = text.replace(f"\n{pin} \\\n", f"\n{pin} \\\n{own}")
    return text


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.lock", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", action="store_true", help="print new versions, write nothing")
    try:
        if parser.parse_args(arguments).versions:
            print(compile_(), end="")
            return 0
        text = with_elsewhere(compile_("--generate-hashes", "--constraint", str(VERSIONS)))
    except FileNotFoundError:
        print("error: there is no uv on PATH: pip install uv, into an environment of its own", file=sys.stderr)
        return 2
    if other := sorted(set(pins(text)) ^ set(pins(VERSIONS.read_text()))):
        print(
            f"error: constraints.txt and pyproject.toml do not fit: {', '.join(other[:5])}; "
            "python -m infra.lock --versions prints what does",
            file=sys.stderr,
        )
        return 2
    HASHED.write_text(HEAD + text)
    print(f"{HASHED.name}: {len(pins(text))} versions, {sum(map(len, hashes(text).values()))} files")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
