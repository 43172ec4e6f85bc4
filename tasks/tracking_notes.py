"""What stands at the head of a run's page in MLflow, as Markdown: the results, before any click."""

from __future__ import annotations

import re
from typing import Any

ROWS = 30  # a table longer than this is read by nobody; the metrics tab has everything
IN_LINE = 6  # numbers in the first line: MLflow shows five lines of a note, the rest on a click
PAD = "\u00a0\u00a0\u00a0"  # MLflow's page sets table cells without any space between them


def results(final: dict[str, float], *, seconds: float, status: str, tables: dict[str, str] | None = None) -> str:
    """A stage's own results: what counts most, its state and its tables in a few lines, its final numbers below.

    Args:
        tables: addresses of tables to read, by name.
    """
    state = {"FINISHED": "Finished in", "RUNNING": "Running for"}.get(status, f"{status.capitalize()} after")
    shown = intervals({name: value for name, value in final.items() if not name.startswith("time/")})
    first = evaluation(final) or " · ".join(f"{name} **{text}**" for name, text in list(shown.items())[:IN_LINE])
    table = number_table("result", dict(list(shown.items())[:ROWS])) if shown else ""
    more = f"\n\n… and {len(shown) - ROWS} more under Metrics." if len(shown) > ROWS else ""
    links = "".join(f" · [**{name}**]({address})" for name, address in (tables or {}).items())
    return "\n\n".join(
        filter(None, [lines(first, f"{state} {duration(seconds)}{cost({'': final})}{links}"), table + more])
    )


def lines(*parts: str) -> str:
    """Lines of one paragraph: MLflow shows a hundred pixels of a note, and space between paragraphs is lost on it."""
    return "  \n".join(filter(None, parts))


def headline(metrics: dict[str, float]) -> str:
    """The evaluation in one line, for the page of the pipeline; "" where it has none."""
    own = {name.removeprefix("evaluate/"): value for name, value in metrics.items() if name.startswith("evaluate/")}
    return evaluation(own)


def evaluation(metrics: dict[str, float]) -> str:
    """How good a policy is and how different from its reference, in a sentence; "" where these are no such metrics."""
    wins = [
        f"{_share(metrics, f'win_rate/{judge}')} by {'the judge' if judge == 'judge' else judge}"
        for judge in ("judge", "gold")
        if f"win_rate/{judge}/mean" in metrics
    ]
    if not wins:
        return ""
    shown = intervals(metrics)
    parts = [f"Wins {', '.join(wins)} over its reference"]
    if "win_rate_length_controlled/judge" in metrics:
        parts.append(f"{100 * metrics['win_rate_length_controlled/judge']:.1f} % at equal length")
    parts += [f"KL {shown['kl']} nats"] if "kl" in shown else []
    names = {"length": "words", "distinct_2": "distinct-2"}
    parts += [
        f"{label} {shown[f'{name}/policy']} (reference's {shown[f'{name}/reference']})"
        for name, label in names.items()
        if f"{name}/policy" in shown and f"{name}/reference" in shown
    ]
    return f"**{parts[0]}**{''.join(f' · {part}' for part in parts[1:])}"


def setting(params: dict[str, Any]) -> str:
    """What data, what model, what judge, which objective: of a whole params.yaml; "" where it is none of ours."""
    try:
        prompts, judge, dpo = params["prompts"], params["verdicts"]["judge"], params["dpo"]
        data = prompts["source"] if prompts["source"] != "files" else _files(prompts["files"])
        rounds = params["rounds"]["count"]
        gold = params["evaluate"]["gold"]
        parts = {
            "Data": data,
            "Model": params["base_model"]["source"],
            "Judge": f"{_judge(judge)}, gold {_judge(gold) if gold else 'none'}",
            "Objective": f"{dpo['loss']}, β {dpo['beta']:g}, learning rate {dpo['learning_rate']:g}, "
            f"K {params['rollouts']['k']}, {rounds} round{'s' if rounds > 1 else ''}",
        }
    except (KeyError, TypeError):
        return ""
    return " · ".join(f"**{name}** {text}" for name, text in parts.items())


def cost(runs: dict[str, dict[str, float]]) -> str:
    """What stages took beside time, as ", 1,234 tokens trained on, …"; their final metrics, by name of the stage."""
    finals = [(name, value) for final in runs.values() for name, value in final.items()]
    added = lambda ending: sum(value for name, value in finals if re.fullmatch(rf"(judge(_\d+)?/)?{ending}", name))
    trained, read, written = added("tokens_seen"), added("prompt_tokens"), added("completion_tokens")
    money = added("money_now")
    parts = [f"{trained:,.0f} tokens trained on"] if trained else []
    parts += [f"judges read {read:,.0f} tokens and wrote {written:,.0f}"] if read else []
    parts += [f"{money:,.2f} paid now at the prices given"] if money else []
    return "".join(f", {part}" for part in parts)


def total(children: list[Any], experiment: str) -> str:
    """What the stages of a pipeline cost together, and where the answers are that changed."""
    ran = {child.info.run_name: child for child in children}
    took = {name: (run.info.end_time - run.info.start_time) / 1000 for name, run in ran.items() if run.info.end_time}
    longest = sorted(took, key=took.get, reverse=True)[:2]
    said = f"**Cost** {duration(sum(took.values()))} in {len(ran)} stage{'s' if len(ran) > 1 else ''}"
    said += f" ({', '.join(f'{name} {duration(took[name])}' for name in longest)})" if len(took) > 1 else ""
    said += cost({name: run.data.metrics for name, run in ran.items()})
    if evaluated := [run for name, run in ran.items() if name.partition("@")[0] == "evaluate"]:
        said += f" · [**Answers, side by side**]({artifact(experiment, evaluated[-1].info.run_id, 'samples.json')})"
    return said if ran else ""


def stages(children: list[Any], experiment: str) -> str:
    """The pipeline's stages in the order they ran, each with a link to its run."""
    if not children:
        return "No stage ran: DVC had every result already."
    lines = [f"| stage that ran{PAD} | state{PAD} | time |", "|:--|:--|--:|"]
    for child in children:
        info = child.info
        link = f"[{info.run_name}]({page(experiment, info.run_id)})"
        took = duration((info.end_time - info.start_time) / 1000) if info.end_time else "–"
        lines.append(f"| {link}{PAD} | {info.status.lower()}{PAD} | {took} |")
    return "\n".join(lines)


def number_table(title: str, values: dict[str, str]) -> str:
    """Names and shown values as a table."""
    lines = [f"| {title}{PAD} | value |", "|:--|:--|", *(f"| {name}{PAD} | {text} |" for name, text in values.items())]
    return "\n".join(lines)


def intervals(values: dict[str, float]) -> dict[str, str]:
    """Numbers as text, with a mean and its bounds on one line: {"win_rate/judge": "0.86 [0.81, 0.90]"}."""
    shown: dict[str, str] = {}
    for name, value in values.items():
        stem, mark, last = re.fullmatch(r"(.*?)([./]?)([^./]*)", name, re.S).groups()
        low, high = values.get(f"{stem}{mark}low"), values.get(f"{stem}{mark}high")
        if last == "mean" and low is not None and high is not None:
            shown[stem] = f"{number(value)} [{number(low)}, {number(high)}]"
        elif not (last in ("low", "high") and f"{stem}{mark}mean" in values):
            shown[name] = number(value)
    return shown


def artifact(experiment: str, run_id: str, path: str) -> str:
    """The address of a run's artifact within the UI."""
    return f"#/experiments/{experiment}/runs/{run_id}/artifacts/{path}?workflowType=machine_learning"


def page(experiment: str, run_id: str) -> str:
    """The address of a run's page within the UI, opened in its model-training mode (it has one for chat too)."""
    return f"#/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning"


def model_page(name: str, version: str = "") -> str:
    """The address of a registered model's page within the UI, or of one version's."""
    return f"#/models/{name}{f'/versions/{version}' if version else ''}?workflowType=machine_learning"


def number(value: float) -> str:
    """Three decimals below ten, then fewer; whole numbers whole; small ones in exponents."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.3f}" if 0.001 <= abs(value) < 10 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 8.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _share(metrics: dict[str, float], stem: str) -> str:
    mean, low, high = (100 * metrics.get(f"{stem}/{part}", float("nan")) for part in ("mean", "low", "high"))
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def _judge(judge: dict[str, Any]) -> str:
    named = {"callable": "function", "stored": "verdicts"}.get(judge["kind"], "model")
    return f"{judge['kind']} {judge[named]}"


def _files(files: dict[str, Any]) -> str:
    paths = [file["path"] for file in files.values() if isinstance(file, dict) and "path" in file]
    return ", ".join(dict.fromkeys(paths)) or "files"
