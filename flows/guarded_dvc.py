"""DVC's command, which writes nothing outside the folder that it restores: `python -m flows.guarded_dvc pull`.

What is in a folder stands in a listing, and a listing comes from a remote or an import, which others may write. dvc
3.67 puts a file where its listing says, ../../.bashrc too; here such a listing is refused whole.

It also empties dvc.lock as a stage ends, and needs tenths of a second to write it anew: killed then, it can read it no
more. Here the new one takes the place of the old.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def guard() -> None:
    """From here on, DVC in this process refuses such listings: as it reads them, and as it is about to write, since it
    keeps what it has read before. And it puts the lock files that it changes in place whole."""
    from dvc.utils.serialize import _common
    from dvc_data.hashfile.tree import Tree
    from dvc_data.index import checkout

    read, apply = Tree.from_list.__func__, checkout.apply

    def from_list(cls: type, listing: list[dict[str, Any]], *rest: Any, **named: Any) -> Any:
        _refuse(entry[cls.PARAM_RELPATH].split("/") for entry in listing)
        return read(cls, listing, *rest, **named)

    def guarded(diff: Any, *rest: Any, **named: Any) -> None:
        changes = (diff.files_create, diff.files_delete, diff.files_chmod, diff.dirs_create, diff.dirs_delete)
        _refuse(entry.key for some in changes for entry in some if entry.key)
        apply(diff, *rest, **named)

    dump = _common._dump_data

    def whole(path: str, *rest: Any, **named: Any) -> None:
        if not str(path).endswith(".lock"):
            return dump(path, *rest, **named)
        there = os.path.realpath(path)
        dump(f"{there}.tmp", *rest, **named)
        if os.path.exists(there):
            shutil.copymode(there, f"{there}.tmp")
        os.replace(f"{there}.tmp", there)

    Tree.from_list, checkout.apply, _common._dump_data = classmethod(from_list), guarded, whole


def _refuse(paths: Iterable[Sequence[str]]) -> None:
    from dvc.exceptions import DvcException

    for parts in paths:
        if {"", ".", ".."} & set(parts):
            why = (
                f"a listing names a file outside its folder, {'/'.join(parts)!r}, so nothing of it was written: "
                "whoever may write to the remote, or to where an import comes from, has made it"
            )
            print(f"error: {why}", file=sys.stderr, flush=True)  # DVC may say in its place that something is missing
            raise DvcException(why)


if __name__ == "__main__":
    guard()
    from dvc.cli import main

    raise SystemExit(main(sys.argv[1:]))
