"""Promotion: does the challenger take the champion's place in the model registry? By rule, or by a person.

    python -m tasks.promote                                  what the rule says and why; no alias moves
    python -m tasks.promote --apply                          and moves it, where the rule holds
    python -m tasks.promote --approve ANNA --reason "..."    a person makes it champion, whatever the rule says
    python -m tasks.promote --reject ANNA --reason "..."     a person turns it down: it is no challenger any more
    python -m tasks.promote --rollback --reason "..."        the champion before takes its place again

Both models answer the held-out prompts, and the judges of section evaluate compare what they say, by the code and
the stores of stage evaluate: nothing is asked twice. The record is reports/promotion/promotion.json, the answers that
differ are in samples.html beside it; the facts also stand on the version's page in MLflow. Not a stage of dvc.yaml:
who is champion is told by the registry, which DVC does not version.
"""

from __future__ import annotations

import argparse
import getpass
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rankwise.fingerprint import digest, tokenizer_digest
from rankwise.rows import write_json, write_rows
from rankwise.types import Row, UserError, show_prompt
from tasks import evaluate, lineage, promotion, promotion_page, rounds, tracking, weights
from tasks.exits import exit_status
from tasks.locks import only_writer
from tasks.params import load, read_yaml
from tasks.promotion import Params
from tasks.stage import HOME, Stage, describe, read_json

REPORT = Path("reports/promotion")
RECORD = REPORT / "promotion.json"
SAMPLE_ROWS = 100  # rows shown in the tracker
LONGEST_TAG = 5000  # characters, MLflow's own limit


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a command line asks for."""

    verb: str  # "check" | "apply" | "approve" | "reject" | "rollback"
    by: str = ""  # the person who decides; "" where the rule does
    reason: str = ""
    versions: str = ""  # "1,2": champion and challenger must be these; "" for whichever they are
    params: Path = Path("params.yaml")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The versions that the aliases name, as the registry has them; None where there is no such alias."""

    name: str
    champion: dict[str, Any] | None
    challenger: dict[str, Any] | None
    found: dict[str, Any]  # the registry's answer, see tasks.tracking_registry

    @property
    def seen(self) -> dict[str, str | None]:
        """The aliases as they were looked at; a move that finds others is refused."""
        return {alias: self.found["aliases"].get(alias) for alias in ("champion", "challenger")}


def promote(asked: Asked) -> dict[str, Any]:
    """Do what is asked; returns the record, which stands in promotion.json too.

    Raises UserError where MLflow is away, where there is nothing to do it to, or where somebody else was quicker.
    """
    params, name = load(asked.params, "promote", Params), read_yaml(asked.params)["register"]["name"]
    with tracking.registry() as registry:
        pair = _pair(name, registry, asked)
        if asked.verb == "rollback":
            record = _rollback(asked, pair, registry)
        elif pair.challenger is None:
            if asked.verb in ("approve", "reject"):
                raise UserError(f"{name} has no challenger to {asked.verb} ({_standing(pair)})")
            record = _record(pair, "nothing", f"there is no challenger ({_standing(pair)})")
        elif asked.verb == "reject":
            known = _known(pair, "")
            record = _reject(asked, pair, registry, known or _record(pair, "keep", "not compared"))
        else:
            record = _decided(asked, pair, registry, _judged(params, pair, registry, asked))
    write_json(RECORD, record)
    return record


def _pair(name: str, registry: tracking.Registry, asked: Asked) -> Pair:
    found = registry.ask("versions", name=name)
    by_number = {version["version"]: version for version in found["versions"]}
    of = lambda alias: by_number.get(found["aliases"].get(alias, ""))
    pair = Pair(name=name, champion=of("champion"), challenger=of("challenger"), found=found)
    now = ",".join(version["version"] if version else "-" for version in (pair.champion, pair.challenger))
    if asked.versions and asked.versions != now:
        raise UserError(
            f"champion and challenger of {name} are {now} by now, and --versions {asked.versions} was asked for: "
            "somebody else decided meanwhile; look again: python -m tasks.promote"
        )
    return pair


# What is found out ----------------------------------------------------------------------------------------------------


def _judged(params: Params, pair: Pair, registry: tracking.Registry, asked: Asked) -> dict[str, Any]:
    """The rule's verdict on a challenger, with all that it rests on."""
    gates = pair.challenger["tags"].get("gates", "unknown")
    if pair.champion is None:
        if gates == "passed":
            return _record(pair, "promote", "there is no champion, and the challenger passed its gates")
        return _record(pair, "keep", f"there is no champion; the challenger's own gates: {gates}")
    number = read_yaml(asked.params)["rounds"]["count"]
    # A version answers once: best-of-N would be the challenger's alone.
    settings = rounds.load(asked.params, "evaluate", evaluate.Params, number)
    settings = replace(settings, best_of=1, against_data=False)
    prompts = evaluate.Paths().prompts / "eval.parquet"
    judge = evaluate.Paths().reward_model
    about = {
        "prompts": {"path": str(prompts), "md5": lineage.md5_of(prompts)},
        "judge": {"judge": asdict(settings.judge), "gold": asdict(settings.gold) if settings.gold else None},
        "judge_md5": lineage.md5_of(judge) if judge.exists() else None,
    }
    key = digest(asdict(params), asdict(settings), about, _version(pair.champion), _version(pair.challenger))
    if asked.verb == "approve" and (known := _known(pair, key)):
        return known  # a person decides on what was shown
    versions = {"champion": pair.champion["version"], "challenger": pair.challenger["version"]}
    with tracking.stage_run("promote", {**asdict(params), **versions}) as tracker:
        stage = Stage("promote", tracker=tracker, report=REPORT, params_file=asked.params, round_=number)
        return _compare(params, settings, pair, registry, stage) | about | {"key": key}


def _compare(
    params: Params, settings: evaluate.Params, pair: Pair, registry: tracking.Registry, stage: Stage
) -> dict[str, Any]:
    folders = {}
    for role, version in (("champion", pair.champion), ("challenger", pair.challenger)):
        folders[role] = weights.of_version(registry, pair.name, version)
        stage.log(f"{role}: version {version['version']}, {folders[role]}")
    paths = evaluate.Paths(policy=folders["challenger"], sft=folders["champion"])
    alike = tokenizer_digest(paths.policy) == tokenizer_digest(paths.sft)
    if not alike:
        stage.log("the two models have different tokenizers: no KL between them")
    measured = evaluate.measure(settings, paths, stage, with_kl=alike)
    if not measured.scores:
        raise UserError(
            "there is neither a judge nor gold to compare the two models with; name one in evaluate.judge or "
            "evaluate.gold (a model that nothing trained, reward_model.enabled, is none)"
        )
    metrics = promotion.renamed(measured.metrics)
    gates = pair.challenger["tags"].get("gates", "unknown")
    decided = pair.challenger["tags"].get("promotion.decision", "")
    checks = promotion.check(metrics, params, gates=gates, decided=decided)
    passed = all(one.passed for one in checks)
    rows = measured.samples()
    changed = promotion.changed(rows, settings.tie_below)
    found = {"metrics": metrics, "checks": promotion.as_records(checks), "changed": changed}
    record = _record(pair, "promote" if passed else "keep", promotion.why(checks)) | found
    if page := stage.tracker.page:
        record["pages"] |= {"run": page, "samples": page.replace("?", "/artifacts/samples.json?")}
    _show(record, rows, stage)
    facts = {
        "promotion.verdict": record["verdict"],
        "promotion.why": record["why"],
        "promotion.against": pair.champion["version"],
        "promotion.run_id": stage.tracker.run_id or "",
        **{f"promotion.win_rate.{judge}": promotion_page.percent(of) for judge, of in metrics["win_rate"].items()},
    }
    text = promotion_page.for_version(record)
    registry.ask("note", name=pair.name, version=pair.challenger["version"], tags=facts, text=text)
    return record


def _show(record: dict[str, Any], rows: list[Row], stage: Stage) -> None:
    """The answers that differ, as a page, a table of all rows, and what the tracker shows of both."""
    write_rows(REPORT / "samples.parquet", rows)
    changed = promotion.by_loss([row for row in rows if row.answers[0].text != row.answers[1].text])
    (REPORT / "samples.html").write_text(promotion_page.page(record, changed), encoding="utf-8")
    table = [
        {
            "prompt": show_prompt(row.prompt),
            "champion": row.answers[1].text,
            "challenger": row.answers[0].text,
            **{f"{judge}: challenger better by": odds for judge, odds in promotion.odds(row).items()},
        }
        for row in changed
    ]
    stage.tracker.table("samples", table[:SAMPLE_ROWS])
    stage.tracker.note(promotion_page.for_run(record))
    stage.finish(record["metrics"])


def _known(pair: Pair, key: str) -> dict[str, Any] | None:
    """The record of an earlier comparison of these two versions, under this key where one is given."""
    if not RECORD.is_file():
        return None
    record = read_json(RECORD)
    same = all(record.get(role) == _version(getattr(pair, role)) for role in ("champion", "challenger"))
    return record if same and (not key or record.get("key") == key) and record["name"] == pair.name else None


def _record(pair: Pair, verdict: str, reason: str) -> dict[str, Any]:
    return {
        "name": pair.name,
        "verdict": verdict,
        "why": reason,
        "champion": _version(pair.champion),
        "challenger": _version(pair.challenger),
        "checks": [],
        "pages": {
            "champion": pair.champion["url"] if pair.champion else "",
            "challenger": pair.challenger["url"] if pair.challenger else "",
            "model": pair.found["url"],
        },
        "decision": None,
    }


def _version(version: dict[str, Any] | None) -> dict[str, str] | None:
    if version is None:
        return None
    tags = version["tags"]
    return {"version": version["version"], "md5": tags["policy_md5"], "commit": tags.get("git.commit", "")}


def _standing(pair: Pair) -> str:
    return f"champion: {'version ' + pair.champion['version'] if pair.champion else 'none'}"


# What is done about it ------------------------------------------------------------------------------------------------


def _decided(asked: Asked, pair: Pair, registry: tracking.Registry, record: dict[str, Any]) -> dict[str, Any]:
    """The record with the decision that was asked for, carried out."""
    if asked.verb == "check" or (asked.verb == "apply" and record["verdict"] != "promote"):
        return record | {"decision": None}
    challenger, champion = pair.challenger["version"], pair.champion and pair.champion["version"]
    decision = _decision("promoted", asked, record["why"])
    tags = {challenger: _tags(decision, pair.challenger) | {"promotion.previous_champion": champion or ""}}
    if champion:
        tags[champion] = {"promotion.replaced_by": challenger}
    _move(pair, registry, {"champion": challenger, "challenger": None}, tags)
    return _told(pair, registry, record | {"decision": decision})


def _reject(asked: Asked, pair: Pair, registry: tracking.Registry, record: dict[str, Any]) -> dict[str, Any]:
    decision = _decision("rejected", asked, "")
    _move(pair, registry, {"challenger": None}, {pair.challenger["version"]: _tags(decision, pair.challenger)})
    return _told(pair, registry, record | {"decision": decision})


def _rollback(asked: Asked, pair: Pair, registry: tracking.Registry) -> dict[str, Any]:
    """The champion before takes its place again; the one that goes is no challenger: the rule would bring it back."""
    before = pair.champion and pair.champion["tags"].get("promotion.previous_champion")
    if not before:
        raise UserError(f"{pair.name}: no champion before the present one is known ({_standing(pair)})")
    weights.pick(pair.found, before, pair.name)  # it may have been deleted
    decision = _decision("rolled back", asked, f"version {before} takes its place again")
    gone = pair.champion["version"]
    _move(
        pair,
        registry,
        {"champion": before},
        {gone: _tags(decision, pair.champion), before: {"promotion.replaced_by": ""}},
    )
    record = _record(pair, "nothing", f"version {gone} was rolled back to version {before}") | {"decision": decision}
    return _told(pair, registry, record | {"champion": _version(weights.pick(pair.found, before, pair.name))})


def _move(pair: Pair, registry: tracking.Registry, to: dict[str, str | None], tags: dict[str, dict[str, str]]) -> None:
    answer = registry.ask("move", name=pair.name, seen=pair.seen, to=to, tags=tags)
    if "changed" in answer:
        raise UserError(
            f"the aliases of {pair.name} were moved meanwhile, from {pair.seen} to {answer['changed']}, and nothing "
            "was changed here; look again: python -m tasks.promote"
        )


def _decision(what: str, asked: Asked, rule: str) -> dict[str, str]:
    by = asked.by or ("rule" if asked.verb == "apply" else getpass.getuser())
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return {"what": what, "by": by, "reason": asked.reason or rule, "at": at}


def _tags(decision: dict[str, str], version: dict[str, Any]) -> dict[str, str]:
    """A decision as tags of the version that it is about; earlier ones stay in its history, newest first."""
    names = {"what": "decision", "by": "decided_by", "reason": "reason", "at": "decided_at"}
    line = f"{decision['at']} {decision['what']} by {decision['by']}: {decision['reason']}"
    history = f"{line}\n{version['tags'].get('promotion.history', '')}".strip()[:LONGEST_TAG]
    return {f"promotion.{names[key]}": value for key, value in decision.items()} | {"promotion.history": history}


def _told(pair: Pair, registry: tracking.Registry, record: dict[str, Any]) -> dict[str, Any]:
    """The decision on the page of the version that it is about."""
    about = pair.champion if record["decision"]["what"] == "rolled back" else pair.challenger
    text = promotion_page.for_version(record)
    registry.ask("note", name=pair.name, version=about["version"], tags={}, text=text)
    return record


# The command ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status. That the rule does not hold is an answer, no failure."""
    asked = _asked(argv)

    def work() -> None:
        with only_writer("promote", "promotion", HOME):
            print(promotion_page.for_terminal(promote(asked)), flush=True)

    return exit_status("promote", work)


def _asked(argv: list[str] | None) -> Asked:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.promote",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"parameters (section promote of params.yaml):\n{describe(Params)}".replace("%", "%%"),
    )
    verbs = parser.add_mutually_exclusive_group()
    verbs.add_argument("--apply", action="store_true", help="make the challenger champion where the rule holds")
    verbs.add_argument("--approve", metavar="NAME", help="make it champion: NAME decides so, whatever the rule says")
    verbs.add_argument("--reject", metavar="NAME", help="take the challenger's alias from it: NAME decides so")
    verbs.add_argument("--rollback", action="store_true", help="the champion before takes its place again")
    parser.add_argument("--reason", default="", metavar="TEXT", help="why; needed by --approve and --reject")
    parser.add_argument(
        "--versions", default="", metavar="N,M", help="do nothing unless champion and challenger are these versions"
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="params file (%(default)s)")
    given = parser.parse_args(argv)
    if (given.approve or given.reject) and not given.reason.strip():
        parser.error("--approve and --reject want a --reason: whoever reads the version's page will ask for it")
    verb = next((verb for verb in ("apply", "approve", "reject", "rollback") if getattr(given, verb)), "check")
    by = given.approve or given.reject or ""
    return Asked(verb=verb, by=by, reason=given.reason.strip(), versions=given.versions, params=given.params)


if __name__ == "__main__":
    raise SystemExit(main())
