"""Stage reward_model: the default judge, a scalar head on the SFT model fitted to labelled rankings (E4).

Where the verdicts come from another judge, `enabled` is false and this stage leaves an empty folder. A reward for RLHF
is fitted to the very preferences that DPO learns: `--labelled data/preferences.parquet`. That table says itself which
rows are held out, so `--labelled-test` is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.fingerprint import file_digest, tokenizer_digest, weights_digest
from rankwise.rows import read_rows
from rankwise.types import Row, UserError
from tasks.params import param
from tasks.stage import Stage, main, output_folder
from tasks.training import TrainingParams, drop_checkpoints, fit, save_trained

if TYPE_CHECKING:
    from rankwise.rendering import TokenRow


@dataclass(frozen=True, kw_only=True)
class Params(TrainingParams):
    enabled: bool = param(True, "train the reward model; false where another judge gives the verdicts")
    epochs: int = param(2, "passes over the rows", ge=1)
    learning_rate: float = param(1e-3, "peak learning rate of AdamW", gt=0)
    batch_size: int = param(16, "rows (prompts) an optimizer step, over all processes", ge=1)
    max_tokens: int = param(0, "longest labelled answer, tokens; a longer one loses its end; 0 is no limit", ge=0)


@dataclass(frozen=True, kw_only=True)
class Paths:
    labelled: Path = Path("data/prompts/labelled.parquet")
    labelled_test: Path = Path("data/prompts/labelled_test.parquet")
    sft: Path = Path("models/sft")
    model: Path = Path("models/reward_model")
    report: Path = Path("reports/reward_model")


def run(params: Params, paths: Paths, stage: Stage) -> None:
    if not params.enabled:
        with output_folder(paths.model):
            stage.log("reward_model.enabled is false: another judge gives the verdicts, nothing is trained")
        stage.finish({"enabled": 0})
        return
    from rankwise.checkpoints import load_tokenizer, new_reward_model
    from rankwise.evaluation import share
    from rankwise.learners import RewardLearner
    from rankwise.parallel import place
    from rankwise.rewards import RewardModel
    from tasks.plots import training_curves

    tokenizer = load_tokenizer(paths.sft)
    labelled, labelled_test, test_table = _split(paths)
    training, test = (_rendered(rows, tokenizer, params) for rows in (labelled, labelled_test))
    module = RewardModel(new_reward_model(paths.sft, tokenizer, seed=params.seed))
    place(module, params.precision)
    learner = RewardLearner(module, 0)
    identity = {
        "sft": weights_digest(paths.sft),
        "tokenizer": tokenizer_digest(paths.sft),
        "labelled": file_digest(paths.labelled),
        "labelled_test": file_digest(test_table),
    }
    measured = fit(stage, learner, training, params, identity=identity, held_out=test)
    accuracy = share(measured["held_out_accuracy"] * len(test), len(test))
    save_trained(module.model, tokenizer, paths.model)
    training_curves(stage.curves, stage.plots / "curves.png")
    stage.tracker.dataset(paths.labelled, "labelled")
    stage.log(
        f"right on {accuracy.mean:.1%} [{accuracy.low:.1%}, {accuracy.high:.1%}] of {len(test)} held-out rankings"
    )
    stage.finish({"test_accuracy": accuracy.as_dict(), "test_rows": len(test), "rows": len(training)})
    drop_checkpoints(stage, params, identity)


def _split(paths: Paths) -> tuple[list[Row], list[Row], Path]:
    """Rows to train on, rows to test on, and the table of these; raises UserError where either are none."""
    rows, test_table = read_rows(paths.labelled), paths.labelled
    training = [row for row in rows if row.meta.get("split") != "held_out"]
    test = [row for row in rows if row.meta.get("split") == "held_out"]
    if not test:
        test_table = paths.labelled_test
        test = [] if test_table == paths.labelled else read_rows(test_table)
    for found, table in ((training, paths.labelled), (test, test_table)):
        if not found:
            raise UserError(
                f"{table}: no labelled ranking to train or test the reward model on; name labelled data in "
                "prompts.files, or set reward_model.enabled to false and choose another judge (judge.kind)"
            )
    return training, test, test_table


def _rendered(rows: Sequence[Row], tokenizer, params: Params) -> list[TokenRow]:
    from rankwise.rendering import Renderer

    renderer = Renderer(tokenizer, max_answer_tokens=params.max_tokens)
    return [renderer.render(row, row.ranked) for row in rows]


if __name__ == "__main__":
    raise SystemExit(main("reward_model", Params, Paths, run))
