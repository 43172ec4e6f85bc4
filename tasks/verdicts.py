"""Stage verdicts: the judge is asked about every answer (or pair of answers); raw replies are kept.

Costly and perhaps not reproducible, so nothing is derived here: `preferences` turns replies into rankings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rankwise.rows import read_rows, write_table
from tasks.judges import JudgeParams, make_judge
from tasks.params import param
from tasks.stage import Stage, main


@dataclass(frozen=True, kw_only=True)
class Params:
    judge: JudgeParams | None = param(
        JudgeParams, "who ranks the answers; null: nobody is asked, preferences.order ranks them"
    )


@dataclass(frozen=True, kw_only=True)
class Paths:
    rollouts: Path = Path("data/rollouts.parquet")
    reward_model: Path = Path("models/reward_model")
    source: Path = Path("data/source")
    verdicts: Path = Path("data/verdicts.parquet")
    report: Path = Path("reports/verdicts")


def run(params: Params, paths: Paths, stage: Stage) -> None:
    import pyarrow as pa

    from rankwise.judging import judge_rows
    from rankwise.store import Store

    rows = read_rows(paths.rollouts)
    replies, asked = [], 0
    if rows and params.judge is not None:
        judge = make_judge(params.judge, trained=paths.reward_model, source=paths.source, where="verdicts.judge")
        with Store(stage.store("verdicts")) as store:
            replies, asked = judge_rows(judge, rows, store)
    stage.log(f"{asked} verdicts asked now, {len(replies) - asked} known before")
    columns = {
        "row_id": pa.array([q.row_id for q, _ in replies], pa.string()),
        "i": pa.array([q.i for q, _ in replies], pa.int32()),
        "j": pa.array([q.j for q, _ in replies], pa.int32()),
        "value": pa.array([r.value for _, r in replies], pa.float64()),
        "mass": pa.array([r.mass for _, r in replies], pa.float64()),
    }
    write_table(paths.verdicts, pa.table(columns))
    stage.tracker.dataset(paths.rollouts, "rollouts")
    masses = [reply.mass for _, reply in replies]
    stage.finish({"verdicts": len(replies), "mass_mean": sum(masses) / len(masses) if masses else 0.0})


if __name__ == "__main__":
    raise SystemExit(main("verdicts", Params, Paths, run))
