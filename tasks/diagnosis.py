"""Stage diagnosis: "the chosen log-prob falls too; is that normal?", answered from the trained policy, row by row.

One forward pass of the policy over training and held-out rows, with the rendering, limits and scoring of stage dpo.
Each margin is split into what the best answer rose by and what the worst fell by, over bins of length and of the
judge's gap; rows that training contradicts or breaks are listed; and the page says in words what all this amounts to.
Several processes (torchrun) share the rows. Nothing reads the result but people: no later stage waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rankwise.fingerprint import digest, sampled_from
from rankwise.rows import write_aside
from rankwise.types import Row, UserError, show_prompt
from tasks import dpo
from tasks.params import param
from tasks.scored_rows import ScoredRows, load
from tasks.stage import Stage, is_first_rank, main

if TYPE_CHECKING:
    from rankwise.diagnosis import Bin, Trained
    from rankwise.reference import Scored
    from rankwise.rendering import TokenRow
    from tasks.diagnosis_facts import Finding

TRACKED_ROWS = 50  # rows of each list shown in the tracker


@dataclass(frozen=True, kw_only=True)
class Params:
    bins: int = param(4, "bins of about equal size by answer length and by the judge's gap", ge=1, le=20)
    listed: int = param(12, "rows shown in full, of each list", ge=0)
    training_rows: int = param(0, "training rows looked at, chosen by a hash of their ids; 0: all", ge=0)
    max_tokens: int = param(8192, "token positions a forward pass: memory grows with it, results do not", ge=1)


@dataclass(frozen=True, kw_only=True)
class Paths:
    preferences: Path = Path("data/preferences.parquet")
    reference: Path = Path("data/reference_logprobs.parquet")
    model: Path = Path("models/sft")  # the reference
    policy: Path = Path("models/policy")
    report: Path = Path("reports/diagnosis")


def run(params: Params, paths: Paths, stage: Stage) -> None:
    training = stage.section("dpo", dpo.Params)
    scored, rows = _trained(params, training, paths)
    if not is_first_rank():
        return
    found = diagnose(rows, params, per_token=training.length_normalised)
    findings = _write(found, scored, training, stage, listed=params.listed)
    for finding in findings[:2]:
        stage.log(finding.text)
    for name, listed in (("contradicted", found.contradicted), ("broken", found.broken)):
        if listed:
            stage.tracker.table(name, [_record(row, scored.texts[row.id]) for row in listed[:TRACKED_ROWS]])
    stage.finish(_metrics(found))


# Numbers -------------------------------------------------------------------------------------------------------------


def _trained(params: Params, training: dpo.Params, paths: Paths) -> tuple[ScoredRows, list[Trained]]:
    """What stage dpo read, and each row with the policy's own log-probabilities."""
    from rankwise.checkpoints import load_causal_lm, load_tokenizer
    from rankwise.parallel import place
    from rankwise.reference import score_rows
    from rankwise.scoring import LogpModel

    tokenizer = load_tokenizer(paths.model)
    if load_tokenizer(paths.policy).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{paths.policy} has another vocabulary than its reference {paths.model}, so their log-probabilities are "
            "of other tokens and no change can be told from them; run stage dpo again (dvc repro dpo)"
        )
    soft = training.loss == "soft_plackett_luce"
    tables = (paths.preferences, paths.reference, paths.model)
    scored = load(*tables, tokenizer, precision=training.precision, soft=soft, texts=True)
    if params.training_rows:
        some = sorted(scored.training, key=lambda row: digest("diagnosis", row.id))[: params.training_rows]
        scored = replace(scored, training=some)
    rows = [*scored.training, *scored.held_out]
    if not rows:
        raise UserError(f"{paths.preferences}: no ranked row, so no change can be told; run stage preferences again")
    module = place(LogpModel(load_causal_lm(paths.policy)), training.precision)
    policy, _ = score_rows(
        module,
        rows,
        weights=str(paths.policy),  # of no store
        precision=training.precision,
        store=None,
        max_tokens=params.max_tokens,
        what="policy log-probs",
    )
    return scored, _joined(scored, policy, training)


def _joined(scored: ScoredRows, policy: Sequence[Scored], training: dpo.Params) -> list[Trained]:
    """Every row with its implicit rewards and its loss, by the settings that it was trained with."""
    from rankwise.diagnosis import Trained

    rows = [*scored.training, *scored.held_out]
    held_out = {row.id for row in scored.held_out}
    rewards, losses = _in_loss(rows, [one.logps for one in policy], scored, training)
    return [
        Trained(
            id=row.id,
            split="held_out" if row.id in held_out else "train",
            reference=tuple(scored.references[row.id]),
            policy=one.logps,
            tokens=one.tokens,
            ranks=row.ranks,
            rewards=tuple(reward[: len(row.ranks)]),
            loss=loss,
            strengths=row.strengths,
            drawn=_drawn(scored.texts[row.id], row, scored.reference),
        )
        for row, one, reward, loss in zip(rows, policy, rewards, losses, strict=True)
    ]


def _in_loss(
    rows: Sequence[TokenRow], policy: Sequence[Sequence[float]], scored: ScoredRows, training: dpo.Params
) -> tuple[list[list[float]], list[float]]:
    """Implicit rewards of each row's answers (zeros behind them where others have more), and each row's loss."""
    import torch

    from rankwise.batching import answer_grid, strength_grid

    mask_BK, ranks_BK = answer_grid(rows)
    width = mask_BK.shape[1]
    grid = lambda values: torch.tensor([[*row, *[0.0] * (width - len(row))] for row in values], dtype=torch.float32)
    settings = dpo.settings_of(training)
    s_BK = settings.rewards(
        grid(policy),
        grid([scored.references[row.id] for row in rows]),
        grid([list(map(len, row.answers_ids)) for row in rows]),
        mask_BK,
    )
    loss_B = settings.losses(s_BK, mask_BK, ranks_BK, strength_grid(rows))
    return s_BK.tolist(), loss_B.tolist()


def _drawn(row: Row, tokens: TokenRow, weights: str) -> bool:
    """Whether the reference drew all of a row's answers, after these very prompt tokens."""
    own = row.meta.get("sampled_from") == sampled_from(weights, tokens.prompt_ids)
    return own and all(answer.source == "policy" for answer in row.answers)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All numbers of the page."""

    rows: list[Trained]
    per_token: bool  # whether the loss, and so the order by likelihood, is a token
    evidence: str  # the split that words, bins and pictures are about
    by_length: list[Bin]  # mean tokens of a row's answers
    by_longer: list[Bin]  # tokens of the best answer minus those of the worst: shorter, alike, longer
    by_gap: list[Bin]  # the judge's log-odds for best over worst, nats; empty where nobody gave any
    sure_gap: float | None  # the median gap of training rows, nats; None where nobody gave any
    contradicted: list[Trained]  # training rows that the policy still orders the other way, the surest first
    broken: list[Trained]  # held-out rows whose order by likelihood was right before training

    def of(self, split: str) -> list[Trained]:
        return [row for row in self.rows if row.split == split]

    @property
    def sure(self) -> list[Trained]:
        """The contradicted rows of whose order the judge was surer than of half of all training rows."""
        return [row for row in self.contradicted if row.gap is not None and row.gap >= self.sure_gap]

    @property
    def shown(self) -> list[Trained]:
        """The rows of the split that words, bins and pictures are about."""
        return self.of(self.evidence)


def diagnose(rows: Sequence[Trained], params: Params, *, per_token: bool) -> Diagnosis:
    """Everything that the page and the metrics hold, from the rows."""
    from rankwise.diagnosis import broken, contradicted, quantile_bins, sign_bins
    from tasks.diagnosis_facts import ENOUGH_ROWS

    held_out = [row for row in rows if row.split == "held_out"]
    training = [row for row in rows if row.split == "train"]
    # Rows that were trained on flatter the policy, so held-out ones speak wherever there are enough of them.
    evidence = "held_out" if len(held_out) >= ENOUGH_ROWS or not training else "train"
    shown = held_out if evidence == "held_out" else training
    gaps = [row.gap for row in training if row.gap is not None]
    # The median, not a number of nats: the scale of a judge's strengths is its own.
    sure_gap = median(gaps) if gaps else None
    return Diagnosis(
        rows=list(rows),
        per_token=per_token,
        evidence=evidence,
        by_length=quantile_bins(shown, lambda row: row.mean_tokens, params.bins),
        by_longer=sign_bins(shown, lambda row: float(row.longer_by)),
        by_gap=quantile_bins(shown, lambda row: row.gap, params.bins),
        sure_gap=sure_gap,
        contradicted=contradicted(training),
        broken=broken(held_out, per_token=per_token),
    )


def _metrics(found: Diagnosis) -> dict[str, Any]:
    from rankwise.diagnosis import as_numbers, by_rank, flips, summary

    told: dict[str, Any] = {"rows": len(found.rows), "contradicted": len(found.contradicted)}
    told["contradicted_though_sure"] = len(found.sure)
    for split in ("train", "held_out"):
        if rows := found.of(split):
            told[split] = as_numbers(summary(rows))
            told[split]["order_by_likelihood"] = flips(rows, per_token=found.per_token)
    ranks = by_rank(found.shown)
    told["change_by_rank"] = {str(rank): change for rank, (_, change, _) in ranks.items()}
    for name in ("by_length", "by_longer", "by_gap"):
        told[name] = {str(number): _bin(one) for number, one in enumerate(getattr(found, name), start=1)}
    return told


def _bin(one: Bin) -> dict[str, Any]:
    answers = one.found.per_answer
    return {
        "from": one.low,
        "to": one.high,
        "rows": one.found.rows,
        "chosen": answers.chosen.mean,
        "rejected": answers.rejected.mean,
        "both_down": one.found.cases["both down"],
        "accuracy": one.found.accuracy.mean,
    }


# Pages ---------------------------------------------------------------------------------------------------------------


def _write(found: Diagnosis, scored: ScoredRows, training: dpo.Params, stage: Stage, *, listed: int) -> list[Finding]:
    from tasks.diagnosis_facts import facts_of
    from tasks.diagnosis_page import html_page, markdown_page
    from tasks.diagnosis_plots import draw
    from tasks.diagnosis_words import findings

    said = findings(facts_of(found), asdict(training))
    pictures = draw(found, stage.plots)
    for name, page in (("diagnosis.md", markdown_page), ("diagnosis.html", html_page)):
        text = page(found, said, scored.texts, pictures, listed=listed)
        write_aside(stage.report / name, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))
    return said


def _record(row: Trained, text: Row) -> dict[str, Any]:
    best, worst = text.answers[0], text.answers[-1]
    return {
        "id": row.id,
        "prompt": show_prompt(text.prompt),
        "best": best.text,
        "worst": worst.text,
        "reward margin": row.reward_margin,
        "judge's gap": row.gap,
        "best changed by": row.changes[0],
        "worst changed by": row.changes[-1],
    }


if __name__ == "__main__":
    raise SystemExit(main("diagnosis", Params, Paths, run))
