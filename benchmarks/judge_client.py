"""The process of benchmarks.judge_load that asks, and is killed: python -m benchmarks.judge_client SPEC.

SPEC is JSON: folder (where the store, the account of tokens and the table of verdicts are), url, verdicts, concurrency,
timeout_s, limit (tokens, or null) and profile (a file for cProfile's statistics, or null). The last line of its output
is what it found, as JSON.
"""

from __future__ import annotations

import cProfile
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rankwise.budget import Budget
from rankwise.client import Endpoint
from rankwise.judging import judge_rows
from rankwise.rubrics import Rubric
from rankwise.server_judge import ServerJudge
from rankwise.store import Store
from rankwise.types import Answer, Row, UserError, text_prompt
from rankwise.verdicts import write_verdicts

WORDS = 60  # of a prompt and of an answer, about
ACCOUNT = "RANKWISE_JUDGE"


def main(spec: dict[str, Any]) -> None:
    folder, table = Path(spec["folder"]), rows(spec["verdicts"])
    judge = judge_of(folder, spec["url"], spec["concurrency"], spec["timeout_s"], spec["limit"])
    memory: list[tuple[int, int]] = []
    judge.ask = _watched(judge.ask, memory)
    profile = cProfile.Profile() if spec["profile"] else None
    said, asked, replies = "", 0, []
    began, cpu = time.monotonic(), time.process_time()
    if profile:
        profile.enable()
    try:
        with Store(folder / "verdicts.sqlite") as store:
            replies, asked = judge_rows(judge, table, store)
    except UserError as error:
        said = str(error)
    if profile:
        profile.disable()
        profile.dump_stats(spec["profile"])
    found = {
        "said": said,
        "asked": asked,
        "seconds": time.monotonic() - began,
        "cpu_s": time.process_time() - cpu,
        "memory": memory,
        "spent": vars(judge.spent()),
    }
    write_verdicts(folder / "verdicts.parquet", [(judge.name, judge.identity, reply) for reply in replies])
    print(json.dumps({**found, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def rows(verdicts: int) -> list[Row]:
    """Pairs of answers for so many verdicts; each pair is asked about in both orders."""
    return [
        Row(id=f"r{i}", prompt=text_prompt(_text("asked", i)), answers=tuple(Answer(text=_text(a, i)) for a in "ab"))
        for i in range(verdicts // 2)
    ]


def judge_of(folder: Path, url: str, concurrency: int, timeout_s: float, limit: int | None) -> ServerJudge:
    rubric = folder / "rubric.md"
    rubric.write_text("The better answer is the one that is worth more.", encoding="utf-8")
    return ServerJudge(
        "judge",
        model="tiny",
        rubric=Rubric(rubric),
        endpoint=Endpoint(url=url, concurrency=concurrency, timeout_s=timeout_s),
        budget=Budget(folder / "spending.sqlite", account=ACCOUNT, limit=limit),
    )


def _text(kind: str, number: int) -> str:
    return " ".join(f"{kind}{number}word{n}" for n in range(WORDS))


def _watched(ask: Any, memory: list[tuple[int, int]]) -> Any:
    """The asking, with (replies so far, bytes resident) noted as they come."""

    def asking(questions: Any) -> Iterator[Any]:
        for count, one in enumerate(ask(questions), start=1):
            if count % 100 == 0:
                memory.append((count, _resident()))
            yield one

    return asking


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
