"""Stage evaluate: the policy against its reference on held-out prompts: reward, win rate, KL, lengths, diversity.

Both models answer the same prompts with the same seeds; several processes (torchrun) share the prompts. `judge` is
the judge that made the training labels; `gold` is another one that training never saw (the generator's ground truth on
the embedded default). Prompts whose answer the data hold measure perplexity on it, and may be compared with it. From
the second round on the report holds the numbers of each round so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.rows import read_rows, write_rows
from rankwise.types import Row, UserError, show_prompt
from tasks.comparison import Judged, agreement, best_answers, compared, models_metrics
from tasks.history import rounds_so_far
from tasks.judges import PREFIX, JudgeParams, make_judge
from tasks.likelihoods import kl, likelihoods
from tasks.params import param
from tasks.rollouts import SamplingParams, request
from tasks.stage import Stage, is_first_rank, main, read_json

if TYPE_CHECKING:
    from rankwise.judging import Judge

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
    best_of: int = param(1, "answers that the policy draws a prompt; the judge's best is its answer (best-of-N)", ge=1)
    against_data: bool = param(False, "compare both models with the data's own answers too, where there are any")
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


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Two models side by side, the policy and what it is held against."""

    prompts: list[Row]
    answers: dict[str, list[Row]]  # of each of MODELS, one a prompt
    scores: dict[str, Judged]  # by "judge" and "gold", those that there are
    metrics: dict[str, Any]

    def samples(self) -> list[Row]:
        """Both answers to every prompt in one row; log-odds of policy over reference in meta."""
        rows = []
        for n, prompt in enumerate(self.prompts):
            both = tuple(self.answers[model][n].answers[0] for model in MODELS)
            odds = {f"{name}_log_odds": judged.odds[n] for name, judged in self.scores.items()}
            rows.append(replace(prompt, answers=both, meta={**prompt.meta, **odds}))
        return rows


def run(params: Params, paths: Paths, stage: Stage) -> None:
    training = read_json(paths.training)
    measured = measure(params, paths, stage, beta=training.get("beta"))
    if measured is None:
        return
    metrics = measured.metrics
    if "held_out_accuracy" in training:
        metrics["preference_accuracy"] = training["held_out_accuracy"]
    if "start_loss" in training:
        metrics["start_loss"] = training["start_loss"]
    if stage.round > 1:
        metrics["rounds"] = rounds_so_far(metrics, stage.round, paths.earlier)
    write_rows(paths.samples, measured.samples())
    _show(measured, stage)
    # The tracker shows the first numbers first.
    stage.finish({name: metrics[name] for name in [*(n for n in HEADLINE if n in metrics), *sorted(metrics)]})


def measure(
    params: Params, paths: Paths, stage: Stage, *, beta: float | None = None, with_kl: bool = True
) -> Measured | None:
    """Let the models in paths.policy and paths.sft answer the held-out prompts, and compare what they say.

    What was answered or judged before is taken from the stores. None on every process of a launch but the first.

    Args:
        beta: of the policy's training against the other model; None where it had none.
        with_kl: KL and perplexity, for which both models need one tokenizer.
    """
    prompts = read_rows(paths.prompts / "eval.parquet")
    if not prompts:
        raise UserError(
            f"{paths.prompts / 'eval.parquet'}: no prompt to evaluate on; name some in prompts.files.eval, or let "
            "prompts.eval_share keep some back"
        )
    stage.tracker.dataset(paths.prompts / "eval.parquet", "held-out prompts")
    drawn = _drawn(prompts, params, paths, stage)
    if not is_first_rank():
        return None
    judges = _judges(params, paths)
    answers = {**drawn, "policy": _chosen(drawn["policy"], judges, params, stage)}
    data = _data_answers(prompts, params, paths)
    metrics: dict[str, Any] = {
        "prompts": len(prompts),
        **_texts(answers),
        **(_likelihood_metrics(answers["policy"], data, params, paths) if with_kl else {}),
        **({"best_of": params.best_of} if params.best_of > 1 else {}),
    }
    if other := _not_its_own(params):
        stage.log(f"kl and objective_e1 are of answers drawn with {', '.join(other)}, not of the model itself")
    scores = {}
    for name, judge in judges.items():
        scores[name] = compared(judge, answers["policy"], answers["reference"], stage=stage, where=f"evaluate.{name}")
        _add_comparison(metrics, name, scores[name], answers, params)
        metrics |= models_metrics(scores[name], MODELS, name, beta=beta, kl=metrics["kl"]["mean"] if with_kl else None)
        if params.against_data and data:
            metrics.setdefault("win_rate_over_data", {})[name] = _over_data(judge, name, answers, data, params, stage)
    if len(scores) == 2:
        metrics["judge_agrees_with_gold"] = agreement(scores["judge"], scores["gold"])
    return Measured(prompts=prompts, answers=answers, scores=scores, metrics=metrics)


def _drawn(prompts: Sequence[Row], params: Params, paths: Paths, stage: Stage) -> dict[str, list[Row]]:
    """Both models' answers. Of a best-of-N the first draw, whose seed is the reference's, is no candidate.

    So the best of N draws of the reference itself is compared with another draw, never with one of its own.
    """
    from rankwise.rollouts import sample_rows
    from rankwise.store import Store

    answers = {}
    with Store(stage.store("rollouts")) as store:
        for model, folder in zip(MODELS, (paths.policy, paths.sft)):
            k = 1 + params.best_of if model == "policy" and params.best_of > 1 else 1
            asked = request(folder, params, k=k, source=model, prefix=f"RANKWISE_{model.upper()}")
            rows, _ = sample_rows(prompts, asked, store)
            answers[model] = [replace(row, answers=row.answers[1:] or row.answers) for row in rows]
    return answers


def _chosen(rows: Sequence[Row], judges: dict[str, Judge], params: Params, stage: Stage) -> list[Row]:
    """The policy's answer to each prompt: what it drew, or the judge's best of what it drew."""
    if params.best_of == 1:
        return list(rows)
    if "judge" not in judges:
        raise UserError(
            f"evaluate.best_of is {params.best_of}, and evaluate.judge is a model that nothing trained "
            "(reward_model.enabled); name a judge, or set best_of to 1"
        )
    return best_answers(judges["judge"], rows, stage=stage, where="evaluate.judge")


def _judges(params: Params, paths: Paths) -> dict[str, Judge]:
    found = {}
    for name, chosen in (("judge", params.judge), ("gold", params.gold)):
        if chosen is not None and not _nothing_trained(chosen, paths):
            found[name] = make_judge(
                chosen,
                trained=paths.reward_model,
                source=paths.source,
                where=f"evaluate.{name}",
                prefix=PREFIXES[name],
            )
    return found


def _add_comparison(
    metrics: dict[str, Any], name: str, judged: Judged, answers: dict[str, list[Row]], params: Params
) -> None:
    if unjudged := len(judged.odds) - len(judged.known):
        metrics.setdefault("unjudged", {})[name] = unjudged
    metrics.setdefault("win_rate", {})[name] = judged.win_rate(params.tie_below).as_dict()
    at_equal_length = judged.at_equal_length(answers["policy"], answers["reference"])
    metrics.setdefault("win_rate_length_controlled", {})[name] = at_equal_length


def _data_answers(prompts: Sequence[Row], params: Params, paths: Paths) -> list[Row]:
    """The data's own answers, as long as the models' may be; none unless every prompt has one."""
    if not all(prompt.answers for prompt in prompts):
        return []
    from rankwise.checkpoints import load_tokenizer
    from rankwise.rendering import Renderer

    renderer = Renderer(
        load_tokenizer(paths.sft), max_prompt_tokens=params.max_prompt_tokens, max_answer_tokens=params.max_new_tokens
    )
    rows = []
    for prompt in prompts:
        own = prompt.ranked[0] if prompt.ranked else prompt.answers[0]
        rendered = renderer.render(prompt, (own,))
        ids = rendered.answers_ids[0]
        text = renderer.answer_text(rendered.prompt_ids, ids)
        rows.append(replace(prompt, answers=(replace(own, text=text, token_ids=ids),)))
    return rows


def _likelihood_metrics(policy: Sequence[Row], data: Sequence[Row], params: Params, paths: Paths) -> dict[str, Any]:
    """KL to the reference, and both models' perplexity on the data's answers where there are any."""
    tables = [policy, data] if data else [policy]
    of = lambda folder: likelihoods(
        tables, folder, max_prompt_tokens=params.max_prompt_tokens, precision=params.precision
    )
    by_policy, by_reference = of(paths.policy), of(paths.sft)
    found: dict[str, Any] = {"kl": kl(by_policy[0], by_reference[0], best_of=params.best_of)}
    if data:
        found["data_perplexity"] = {"policy": by_policy[1].perplexity, "reference": by_reference[1].perplexity}
    return found


def _over_data(judge: Judge, name: str, answers: dict, data: Sequence[Row], params: Params, stage: Stage) -> dict:
    """Each model's win rate over the data's own answers."""
    return {
        model: compared(judge, answers[model], data, stage=stage, where=f"evaluate.{name}")
        .win_rate(params.tie_below)
        .as_dict()
        for model in MODELS
    }


def _not_its_own(params: Params) -> list[str]:
    """The settings under which answers are not draws from the model's own distribution."""
    rest = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    return [name for name, value in rest.items() if getattr(params, name) != value]


def _nothing_trained(params: JudgeParams, paths: Paths) -> bool:
    # An offline recipe may have no judge at all; then the comparison rests on gold and on preference accuracy.
    needs = params.kind in ("reward_model", "local_llm") and params.model == "trained"
    return needs and not (paths.reward_model / "config.json").exists()


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


def _show(measured: Measured, stage: Stage) -> None:
    from tasks import plots

    answers, scores, metrics, table = measured.answers, measured.scores, measured.metrics, []
    for n, prompt in enumerate(measured.prompts):
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
                *judged.known_scores(),
                stage.plots / f"{name}_rewards.png",
                unit=f"score given by {'the training judge' if name == 'judge' else 'gold'}",
            )


if __name__ == "__main__":
    raise SystemExit(main("evaluate", Params, Paths, run))
