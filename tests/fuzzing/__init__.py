"""Bad input at scale: every reader of the project, given files that people, programs and broken disks could have made.

    python -m tests.fuzzing --cases 1000000 --out reports/fuzzing     a campaign: a table, a report, reproducers
    python -m tests.fuzzing --reader csv --cases 5000                 one reader
    python -m tests.fuzzing --replay csv:1234                         one case again, with its traceback

A case is a name and a number: the number seeds what makes its files (fuzzing.trees and fuzzing.octets spoil files that
are whole), so it is the same everywhere. The law (fuzzing.law) is one for all readers: a well-formed value of which
nothing was dropped in silence, or a UserError that names the place; no other exception, no hang, no huge allocation.
tests/test_bad_bytes.py holds a few dozen cases of each reader to it, tests/test_bad_files.py says what was mended.

Why not coverage-guided (atheris): most of the work of a reader here is done by C libraries that such a guide cannot
see into, and cases that are made from whole files reach the lines of the readers as it is (docs/reliability.md).
"""
