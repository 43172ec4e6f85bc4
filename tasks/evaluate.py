"""Stage evaluate: the policy against its reference on held-out prompts: reward, win rate, KL, lengths, diversity.

Both models answer the same prompts with the same seeds; several processes (torchrun) share the prompts. `judge` is
the judge that made the training labels; `gold` is another one that training never saw (the generator's ground truth on
the embedded default). From the second round on the report holds the numbers of each round so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.rows import read_rows, write_rows
from rankwise.types import Row, UserError, show_prompt
from tasks.history import rounds_so_far
from tasks.judges import PREFIX, JudgeParams, make_judge
from tasks.params import param
from tasks.rollouts import SamplingParams, request
from tasks.stage import Stage, is_first_rank, main, read_json

if TYPE_CHECKING:
    from rankwise.evaluation import Estimate
    from rankwise.verdicts import Verdict

MODELS = ("policy", "reference")
PREFIXES = {"judge": PREFIX, "gold": "RANKWISE_GOLD"}  # of the environment's variables about a judge's server
HEADLINE = ("win_rate", "positive_share", "reward", "kl", "length", "preference_accuracy")
SAMPLE_ROWS = 100  # rows shown in the tracker, largest changes first


@dataclass(frozen=True, kw_only=True)
class Params(SamplingParams):
    judge: JudgeParams = param(JudgeParams, "the judge that made the labels, as in verdicts")
    gold: JudgeParams | None = param(
        lambda: JudgeParams(kind="callable", function="rankwise.corpus:ground_truth"),
        "a judge that training never saw; null where there is none",
    )
    tie_below: float = param(0.0, "scores at most this far apart (log-odds, nats) are a tie", ge=0)
    seed: int = param(1, "seed of the answers")


@dataclass(frozen=True, kw_only=True)
class Paths:
    prompts: Path = Path("data/prompts")
    source: Path = Path("data/source")
    policy: Path = Path("models/policy")
    sft: Path = Path("models/sft")
    reward_model: Path = Path("models/reward_model")
    training: Path = Path("reports/dpo/metrics.json")
    earlier: Path = Path("reports/sft/metrics.json")  # evaluation of the round before; unread in round 1
    samples: Path = Path("data/evaluation.parquet")
    report: Path = Path("reports/evaluate")


def run(params: Params, paths: Paths, stage: Stage) -> None:
    prompts = read_rows(paths.prompts / "eval.parquet")
    if not prompts:
        raise UserError(
            f"{paths.prompts / 'eval.parquet'}: no prompt to evaluate on; name some in prompts.files.eval, or let "
            "prompts.eval_share keep some back"
        )
    answers = _answers(prompts, params, paths, stage)
    if not is_first_rank():
        return
    metrics: dict[str, Any] = {"prompts": len(prompts), **_texts(answers), "kl": _kl(answers["policy"], params, paths)}
    if other := _not_its_own(params):
        stage.log(f"kl and objective_e1 are of answers drawn with {', '.join(other)}, not of the model itself")
    scores = {}
    for name, judge_params in (("judge", params.judge), ("gold", params.gold)):
        if judge_params is not None and not _nothing_trained(judge_params, paths):
            scores[name] = _judge(name, judge_params, answers, paths, stage)
    for name, judged in scores.items():
        if unjudged := len(prompts) - len(judged.known):
            metrics.setdefault("unjudged", {})[name] = unjudged
        metrics.setdefault("win_rate", {})[name] = judged.win_rate(params.tie_below).as_dict()
        metrics.setdefault("win_rate_length_controlled", {})[name] = judged.at_equal_length(answers)
        metrics |= judged.metrics(name, beta=_beta(paths), kl=metrics["kl"]["mean"])
    if len(scores) == 2:
        metrics["judge_agrees_with_gold"] = _agreement(scores["judge"], scores["gold"])
    training = read_json(paths.training)
    if "held_out_accuracy" in training:
        metrics["preference_accuracy"] = training["held_out_accuracy"]
    metrics["start_loss"] = training["start_loss"]
    if stage.round > 1:
        metrics["rounds"] = rounds_so_far(metrics, stage.round, paths.earlier)
    write_rows(paths.samples, _samples(prompts, answers, scores))
    _show(prompts, answers, scores, metrics, stage)
    # The tracker shows the first numbers first.
    stage.finish({name: metrics[name] for name in [*(n for n in HEADLINE if n in metrics), *sorted(metrics)]})


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One judge's view: log-odds that the policy's answer is better, one a prompt; scores where it scores.

    None stands where the judge gave no valid verdict; such a prompt is in no rate and no mean.
    """

    odds: list[float | None]
    scores: dict[str, list[float | None]] | None  # model -> score a prompt; None for pairwise judges

    @property
    def known(self) -> list[int]:
        """The prompts that have a verdict, by number."""
        given = [self.odds, *(self.scores or {}).values()]
        return [n for n, values in enumerate(zip(*given)) if None not in values]

    def win_rate(self, tie_below: float) -> Estimate:
        from rankwise.evaluation import win_rate

        odds = [self.odds[n] for n in self.known]
        return win_rate(odds, [0.0] * len(odds), tie_below=tie_below)

    def at_equal_length(self, answers: dict[str, list[Row]]) -> float:
        from rankwise.evaluation import length_controlled_win_rate

        words = {m: [len(rows[n].answers[0].text.split()) for n in self.known] for m, rows in answers.items()}
        odds = [self.odds[n] for n in self.known]
        return length_controlled_win_rate(odds, [0.0] * len(odds), words["policy"], words["reference"])

    def metrics(self, name: str, *, beta: float, kl: float) -> dict[str, Any]:
        from rankwise.evaluation import mean, objective, share

        if self.scores is None:
            return {}
        scores = {model: [values[n] for n in self.known] for model, values in self.scores.items()}
        rewards = {model: mean(values) for model, values in scores.items()}
        found = {
            "reward" if name == "judge" else "gold_reward": {m: estimate.as_dict() for m, estimate in rewards.items()}
        }
        if name == "judge":
            # E1 of the policy; the reference's own is its reward, its KL being zero.
            found["objective_e1"] = {
                "policy": objective(rewards["policy"].mean, kl, beta),
                "reference": rewards["reference"].mean,
            }
        else:
            found["positive_share"] = {
                m: share(sum(v > 0 for v in values), len(values)).as_dict() for m, values in scores.items()
            }
        return found


def _answers(prompts: Sequence[Row], params: Params, paths: Paths, stage: Stage) -> dict[str, list[Row]]:
    from rankwise.rollouts import sample_rows
    from rankwise.store import Store

    answers = {}
    with Store(stage.store("rollouts")) as store:
        for model, folder in zip(MODELS, (paths.policy, paths.sft)):
            asked = request(folder, params, k=1, source=model, prefix=f"RANKWISE_{model.upper()}")
            answers[model], _ = sample_rows(prompts, asked, store)
    return answers


def _not_its_own(params: Params) -> list[str]:
    """The settings under which answers are not draws from the model's own distribution."""
    rest = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    return [name for name, value in rest.items() if getattr(params, name) != value]


def _kl(rows: Sequence[Row], params: Params, paths: Paths) -> dict[str, float]:
    """KL(π‖π_ref) a sequence, nats: mean of log π − log π_ref over answers drawn from the policy."""
    from rankwise.evaluation import mean

    (policy, tokens), (reference, _) = (_logps(rows, folder, params) for folder in (paths.policy, paths.sft))
    gaps = [p - r for p, r in zip(policy, reference)]
    return {**mean(gaps).as_dict(), "per_token": sum(gaps) / tokens}


def _logps(rows: Sequence[Row], folder: Path, params: Params) -> tuple[list[float], int]:
    """Σ log-probs of each row's answer under a model, nats; and the tokens of all answers together."""
    import torch

    from rankwise.batching import micro_batches
    from rankwise.checkpoints import device, load_causal_lm, load_tokenizer, numerics
    from rankwise.rendering import Renderer
    from rankwise.scoring import LogpModel

    renderer = Renderer(load_tokenizer(folder), max_prompt_tokens=params.max_prompt_tokens)
    rendered = [renderer.render(row) for row in rows]
    module = LogpModel(load_causal_lm(folder).to(device())).eval()
    found: dict[str, float] = {}
    with torch.inference_mode(), numerics(params.precision, device()):
        for part in micro_batches(rendered, max_tokens=8192, cost=module.cost):
            sums = module(module.batch(part, 0).to(device())).sum_A.tolist()
            found |= dict(zip((row.id for row in part), sums))
    return [found[row.id] for row in rows], sum(len(row.answers_ids[0]) for row in rendered)


def _nothing_trained(params: JudgeParams, paths: Paths) -> bool:
    # An offline recipe may have no judge at all; then the comparison rests on gold and on preference accuracy.
    needs = params.kind in ("reward_model", "local_llm") and params.model == "trained"
    return needs and not (paths.reward_model / "config.json").exists()


def _judge(name: str, params: JudgeParams, answers: dict[str, list[Row]], paths: Paths, stage: Stage) -> Judged:
    """A judge's view of both models' answers; raises UserError where it gave no valid verdict at all."""
    from rankwise.judging import judge_rows
    from rankwise.store import Store
    from rankwise.verdicts import verdict_of

    judge = make_judge(
        params, trained=paths.reward_model, source=paths.source, where=f"evaluate.{name}", prefix=PREFIXES[name]
    )
    pairs = [
        replace(policy, answers=(policy.answers[0], reference.answers[0]))
        for policy, reference in zip(answers["policy"], answers["reference"])
    ]
    with Store(stage.store("verdicts")) as store:
        replies, _ = judge_rows(judge, pairs, store, what=f"verdicts of {name}")
    said: dict[str, list[Verdict]] = {row.id: [] for row in pairs}
    for reply in replies:
        said[reply.question.row_id].append(verdict_of(judge.name, judge.identity, reply))
    judged = _view(pairs, said, scores=not judge.pairwise)
    if not judged.known:
        raise UserError(
            f"evaluate.{name}: none of the {len(pairs)} prompts has a valid verdict, so nothing can be compared; look "
            f"at what the judge replied ({stage.store('verdicts')} keeps it), or name another judge"
        )
    if unjudged := len(pairs) - len(judged.known):
        stage.log(f"{name}: {unjudged} of {len(pairs)} prompts have no valid verdict and are left out of its numbers")
    return judged


def _view(pairs: Sequence[Row], said: dict[str, list[Verdict]], *, scores: bool) -> Judged:
    from rankwise.ranking import compare

    odds = [float(compare(row, said[row.id]).odds_KK[0, 1]) for row in pairs]
    return Judged(
        odds=[None if math.isnan(value) else value for value in odds],
        scores={m: [_score(said[row.id], n) for row in pairs] for n, m in enumerate(MODELS)} if scores else None,
    )


def _score(verdicts: Sequence[Verdict], place: int) -> float | None:
    """A pointwise judge's score of the answer at a place of the row, the mean of its draws."""
    values = [verdict.values[0] for verdict in verdicts if verdict.shown == (place,) and verdict.values is not None]
    return sum(values) / len(values) if values else None


def _texts(answers: dict[str, list[Row]]) -> dict[str, Any]:
    """Length and diversity of both models' answers; distinct-n over equally many words, or length would decide."""
    from rankwise.evaluation import distinct_n

    texts = {m: [row.answers[0].text for row in rows] for m, rows in answers.items()}
    words = {m: [len(text.split()) for text in mine] for m, mine in texts.items()}
    cut = {m: sum(row.answers[0].finish_reason == "length" for row in rows) / len(rows) for m, rows in answers.items()}
    common = max(2, min(round(sum(mine) / len(mine)) for mine in words.values()))
    return {
        "length": {m: sum(mine) / len(mine) for m, mine in words.items()},
        "distinct_1": {m: distinct_n(mine, 1, words=common) for m, mine in texts.items()},
        "distinct_2": {m: distinct_n(mine, 2, words=common) for m, mine in texts.items()},
        "cut_share": cut,
    }


def _beta(paths: Paths) -> float:
    return float(read_json(paths.training)["beta"])


def _agreement(judge: Judged, gold: Judged) -> dict[str, float]:
    """How far the training judge agrees with gold: on which answer is better, and in scores."""
    from rankwise.evaluation import correlation

    decided = [(a, b) for a, b in zip(judge.odds, gold.odds) if a and b]
    found = {"pairs": sum((a > 0) == (b > 0) for a, b in decided) / max(1, len(decided))}
    if judge.scores and gold.scores:
        both = sorted(set(judge.known) & set(gold.known))
        pooled = [[side.scores[model][n] for model in MODELS for n in both] for side in (judge, gold)]
        found["correlation"] = correlation(*pooled)
    return found


def _samples(prompts: Sequence[Row], answers: dict[str, list[Row]], scores: dict[str, Judged]) -> list[Row]:
    """Both answers to every prompt in one row; log-odds of policy over reference in meta."""
    rows = []
    for n, prompt in enumerate(prompts):
        both = tuple(answers[model][n].answers[0] for model in MODELS)
        odds = {f"{name}_log_odds": judged.odds[n] for name, judged in scores.items()}
        rows.append(replace(prompt, answers=both, meta={**prompt.meta, **odds}))
    return rows


def _show(prompts, answers, scores: dict[str, Judged], metrics: dict, stage: Stage) -> None:
    from tasks import plots

    table = []
    for n, prompt in enumerate(prompts):
        record = {"prompt": show_prompt(prompt.prompt)}
        record |= {model: answers[model][n].answers[0].text for model in reversed(MODELS)}
        better = {name: judged.odds[n] for name, judged in scores.items()}
        record |= {f"{name}: policy better by": None if o is None else round(o, 3) for name, o in better.items()}
        table.append(record)
    # The most lost first: what a reviewer wants to see before agreeing.
    keys = [f"{name}: policy better by" for name in scores]
    loss = lambda record: math.inf if not keys or record[keys[-1]] is None else record[keys[-1]]
    stage.tracker.table("samples", sorted(table, key=loss)[:SAMPLE_ROWS])
    sampled = {m: [row.answers[0].token_ids for row in rows] for m, rows in answers.items()}
    lengths = {m: [len(ids) for ids in mine if ids is not None] for m, mine in sampled.items()}
    if all(lengths.values()):  # some servers give text alone
        plots.length_histogram(lengths["policy"], lengths["reference"], stage.plots / "lengths.png")
    if "rounds" in metrics:
        plots.rounds(metrics["rounds"], stage.plots / "rounds.png")
    if win_rates := metrics.get("win_rate"):
        plots.win_rates([{"name": name, **found} for name, found in win_rates.items()], stage.plots / "win_rates.png")
    for name, judged in scores.items():
        if judged.scores:
            plots.reward_histogram(
                *([judged.scores[model][n] for n in judged.known] for model in MODELS),
                stage.plots / f"{name}_rewards.png",
                unit=f"score given by {'the training judge' if name == 'judge' else 'gold'}",
            )


if __name__ == "__main__":
    raise SystemExit(main("evaluate", Params, Paths, run))
