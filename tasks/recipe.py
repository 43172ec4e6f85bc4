"""Recipes: params.yaml is the embedded default, a recipe changes some of it. `python -m tasks.recipe --help`.

    python -m tasks.recipe                                      the embedded default again
    python -m tasks.recipe recipes/imdb.yaml                    params.yaml of the recipe
    python -m tasks.recipe recipes/imdb.yaml --data PATH ...    and PATH linked into data/source
    python -m tasks.recipe recipes/imdb.yaml --set dpo.beta=0.3 and another value over the recipe's
    python -m tasks.recipe params.yaml                          rounds.each written anew, after rounds.count was changed

A recipe file holds sections and keys of params.yaml, only those that differ from the default; a key or value that no
stage knows is refused. params.yaml is written whole, a comment beside every key, so it reads without the recipe.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from rankwise.rows import write_aside
from rankwise.types import UserError
from tasks import rounds, yaml_text
from tasks.params import build, merged, read_yaml, section_of

# In the order of the pipeline.
STAGES = (
    "prompts",
    "base_model",
    "doctor",
    "sft",
    "reward_model",
    "rollouts",
    "verdicts",
    "audit_judge",
    "preferences",
    "reference_logprobs",
    "dpo",
    "diagnosis",
    "evaluate",
    "register",
)
BESIDE = ("policy_gradient", "frontier", "promote")  # stages that sweeps alone have; a command that is no stage
SECTIONS = (*STAGES[: STAGES.index("rollouts")], "rounds", *STAGES[STAGES.index("rollouts") :], *BESIDE)
HEAD = """\
# What defines a result, one section a stage. Devices, keys, addresses and worker counts are not here.
# `python -m tasks.recipe` writes this file anew (defaults, or a recipe); edit it as you like in between.
"""
COLUMN = 44  # where comments begin


def apply(recipe: Path | None, params_file: Path = Path("params.yaml"), *, overrides: Sequence[str] = ()) -> list[str]:
    """Write params.yaml as the defaults with a recipe over them; returns the changed lines, as a diff.

    Args:
        overrides: values that stand over the recipe's, as "dpo.beta=0.3"

    Raises UserError on a key or value that no stage knows; params.yaml is then left as it was.
    """
    overlay = read_yaml(recipe) if recipe is not None else {}
    for words in overrides:
        _override(overlay, words)
    text = render(overlay, where=", ".join([str(recipe), *(words[:200] for words in overrides)]))
    before = params_file.read_text(encoding="utf-8") if params_file.exists() else ""
    write_aside(params_file, lambda aside: aside.write_text(text, encoding="utf-8"))
    diff = difflib.unified_diff(before.splitlines(), text.splitlines(), lineterm="", n=0)
    return [line for line in diff if line[:1] in "+-" and line[:3] not in ("+++", "---")]


def _override(overlay: dict[str, Any], words: str) -> None:
    """Put one KEY=VALUE over an overlay; the value is read as YAML, as `dvc exp run -S` reads it."""
    key, equals, value = words.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not sections or not all([*sections, last]):
        raise UserError(f"{words[:200]!r}: SECTION.KEY=VALUE was expected, such as dpo.beta=0.3")
    try:
        read = yaml_text.parse(value)
    except yaml_text.NotYaml:
        raise UserError(f"{words[:200]!r}: no YAML value; put text with special signs in quotes") from None
    for section in sections:
        overlay = overlay.setdefault(section, {})
        if not isinstance(overlay, dict):
            raise UserError(f"{words[:200]!r}: {section} holds a value, no keys")
    overlay[last] = read


def render(overlay: dict[str, Any], *, where: str = "recipe") -> str:
    """The text of params.yaml for a recipe's overlay."""
    unknown = [section for section in overlay if section not in SECTIONS]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), SECTIONS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{where}: no stage is called {unknown[0]!r}{hint} (sections: {', '.join(SECTIONS)})")
    graph = rounds.section(_mapping(overlay, "rounds", where), where=f"{where}: rounds")
    parts = [HEAD]
    for name in SECTIONS:
        if name == "rounds":
            lines = _round_lines(graph)
        else:
            params_type = importlib.import_module(f"tasks.{name}").Params
            values = merged(params_type(), overlay.get(name) or {})
            plain = build(params_type, values, where=f"{where}: {name}")
            for number, entry in graph["each"].items() if name in rounds.STAGES else ():
                build(params_type, merged(plain, entry[name]), where=f"{where}: rounds.each.{number}.{name}")
            lines = _lines(params_type, values, indent="  ")
        parts.append("\n".join([f"{name}:", *lines]) + "\n")
    return "\n".join(parts)


def _mapping(overlay: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    found = overlay.get(name) or {}
    if not isinstance(found, dict):
        raise UserError(f"{where}: {name}: a mapping was expected, found {found!r}")
    return found


def _round_lines(graph: dict[str, Any]) -> list[str]:
    """Section rounds: what is chosen, and under each round its names and its own parameters."""
    chosen = {spec.name: graph[spec.name] for spec in fields(rounds.Params)}
    lines = _lines(rounds.Params, chosen, indent="  ")
    lines.append(_commented(f"  last: {_scalar(graph['last'])}", rounds.WRITTEN["last"]))
    lines.append(_commented("  each:", rounds.WRITTEN["each"]))
    for number, entry in graph["each"].items():
        lines.append(f"    {_scalar(number)}:")
        for name, value in entry.items():
            doc = rounds.ENTRY.get(name) or f"parameters of section {name} in this round alone"
            lines.append(_commented(f"      {name}: {_scalar(value)}", doc))
    return lines


def link_sources(paths: Sequence[Path], source: Path = Path("data/source")) -> list[Path]:
    """Link files or folders into data/source under their own names; an existing link is renewed, a file is not."""
    targets = [source / path.resolve().name for path in paths]
    for path, target in zip(paths, targets):
        if not path.exists():
            raise UserError(f"--data {path}: no such file or folder")
        if target.exists() and not target.is_symlink():
            raise UserError(f"{target} is there already and is no link; move it away, or leave out --data {path}")
    source.mkdir(parents=True, exist_ok=True)
    for path, target in zip(paths, targets):
        target.unlink(missing_ok=True)
        target.symlink_to(os.path.abspath(path))
    return targets


def _lines(params_type: type, values: dict[str, Any], indent: str) -> list[str]:
    lines, hints = [], typing.get_type_hints(params_type)
    for spec in fields(params_type):
        value, section = values[spec.name], section_of(hints[spec.name])
        if section and value is not None:
            lines.append(_commented(f"{indent}{spec.name}:", spec.metadata["doc"]))
            lines += _lines(section, value, indent + "  ")
        elif isinstance(value, list) and value:
            lines.append(_commented(f"{indent}{spec.name}:", spec.metadata["doc"]))
            lines += [f"{indent}- {_scalar(item)}" for item in value]
        else:
            lines.append(_commented(f"{indent}{spec.name}: {_scalar(value)}".rstrip(" "), spec.metadata["doc"]))
    return lines


def _scalar(value: Any) -> str:
    # As DVC writes them back (`dvc exp run -S`), so that an experiment changes one line of the file.
    if value is None:
        return ""
    if isinstance(value, float):
        # YAML 1.1 reads 5e-07 as text; it wants a point.
        text = repr(value)
        return text if "." in text or "e" not in text else text.replace("e", ".0e")
    flow = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    return flow.removesuffix("\n").removesuffix("\n...").strip(" \n")  # a text may be a no-break space


def _commented(text: str, doc: str) -> str:
    return f"{text:<{COLUMN}}  # {doc}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", type=Path, help="a file of recipes/, or your own; none: the default")
    parser.add_argument("--data", nargs="+", type=Path, default=[], help="files or folders to link into data/source")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a value over the recipe's: dpo.beta=0.3"
    )
    arguments = parser.parse_args(argv)
    try:
        for link in link_sources(arguments.data):
            print(f"linked {link}")
        changed = apply(arguments.recipe, overrides=arguments.set)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(changed) if changed else "params.yaml is unchanged")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
