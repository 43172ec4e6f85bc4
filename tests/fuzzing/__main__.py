"""The command line of the campaigns: `python -m tests.fuzzing --help`."""

from __future__ import annotations

from .command import main

if __name__ == "__main__":
    raise SystemExit(main())
