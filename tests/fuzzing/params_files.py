"""Readers of YAML that people write: params.yaml, recipes, sweeps, --set, --over, and dvc.lock as it is read here."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from random import Random

import yaml

from rankwise.types import UserError
from tasks import lineage, params, recipe, rounds, sweep

from . import octets, trees
from .law import ROOT, Files, Unlawful, holds, reader

_TOLD = "case.yaml"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n" for before, name in zip("abcdefgh", "bcdefghi")
)
ODD = (
    *(
        LAUGHS,
        MERGES,
        "a: &a [*a]\n",
        "&a a: *a\n",
        "? [a]\n: 1\n",
        "{}: 1\n",
        "<<: 1\n",
        "= : 1\n",
        "- a\n",
        "a\n",
        "",
    ),
    *("[" * 900, "{a: " * 400, "- " * 500, "a:\n" + "".join(" " * n + "a:\n" for n in range(1, 400)), "a: !!binary x"),
    *("1: 2\n", "2026-11-28: 1\n", "null: 1\n", "a: 1\na: 2\n", "a: !!python/object:os.system x\n", "a: 0x_\n"),
    *(
        "a: !!timestamp x\n",
        "a: !!bool x\n",
        "a: !!int x\n",
        "a: 2026-13-45\n",
        f"a: 0x{'f' * 5000}\n",
        f"a: {'9' * 5000}\n",
    ),
    *(
        "a: !!omap [1]\n",
        "a: !!set {b, c}\n",
        "a: 190:20:30\n",
        "a: .inf\n",
        "%TAG ! x\n--- a\n",
        "--- a\n--- b\n",
        "\tx: 1\n",
    ),
)
_WHOLE: dict[str, list[str]] = {}


def _whole(pattern: str) -> list[str]:
    """Texts of the project's own files of a kind."""
    if pattern not in _WHOLE:
        _WHOLE[pattern] = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob(pattern))]
    return _WHOLE[pattern]


def spoilt_yaml(random: Random, pattern: str, parts: int = 4) -> bytes:
    """One of the project's files: some of its sections, changed as a tree, as a text, or both; or another text."""
    kind = random.randrange(10)
    if kind == 0:
        return _with_own_line(random, random.choice(ODD))
    text = _some(random, random.choice(_whole(pattern)), parts)
    if kind <= 6:
        document = trees.changed(random, yaml.load(text, yaml.CSafeLoader))
        text = trees.as_json(random, document) if random.random() < 0.3 else _dumped(document)
    data = trees.octets(text)
    return octets.spoilt(random, data, data) if kind >= 5 else data


def _some(random: Random, text: str, parts: int) -> str:
    """Some sections of a file, as they stand there; all where it has no more."""
    sections = re.split(r"(?m)^(?=[a-z_]+:)", text)[1:]
    return "".join(random.sample(sections, min(len(sections), random.randrange(1, parts + 1))))


def _dumped(document: object) -> str:
    try:
        return yaml.dump(document, Dumper=yaml.CSafeDumper, sort_keys=False)
    except (yaml.YAMLError, UnicodeEncodeError, ValueError):
        return json.dumps(document, default=str)


def _with_own_line(random: Random, text: str) -> bytes:
    data = trees.octets(text)
    return octets.spoilt(random, data, data) if random.random() < 0.5 else data


def _read_params(folder: Path) -> None:
    """Every section that the file may hold, as its stage loads it."""
    path = folder / "params.yaml"
    document = params.read_yaml(path)
    holds(isinstance(document, dict), "no mapping")
    told = []
    for name in [name for name in document if name in recipe.SECTIONS and name != "rounds"] or ["dpo"]:
        try:
            own = params.load(path, name, importlib.import_module(f"tasks.{name}").Params)
            holds(
                params.merged(own, {}) == params.merged(own, document[name]), "a parameter is another than the file's"
            )
        except UserError as error:
            told.append(error)
    if "rounds" in document:
        rounds.check(document, str(path))
    if told:
        raise told[0]


def _read_recipe(folder: Path) -> None:
    """What a recipe makes of params.yaml is what a stage then reads, and written anew it is the same."""
    made, again = folder / "params.yaml", folder / "again.yaml"
    overrides = [line for line in (folder / "set.txt").read_text(encoding="utf-8").split("\x1f") if line]
    recipe.apply(folder / "recipe.yaml", made, overrides=overrides)
    document = params.read_yaml(made)
    try:
        rounds.check(document, str(made))
        for name in recipe.SECTIONS:
            if name != "rounds":
                params.load(made, name, importlib.import_module(f"tasks.{name}").Params)
        recipe.apply(made, again)
    except UserError as error:
        raise Unlawful(f"params.yaml as a recipe made it is refused: {error}") from error
    holds(made.read_bytes() == again.read_bytes(), "a recipe of params.yaml itself changes it")


def _recipe(random: Random) -> Files:
    value = lambda: trees.as_json(random, trees.odd(random)) if random.random() < 0.5 else random.choice(trees.TEXTS)
    keys = (
        "dpo.beta",
        "rollouts.stop",
        "rounds.count",
        "prompts.files.sft.where",
        "dpo",
        "x.y",
        "rounds.each.1.dpo.beta",
    )
    given = [f"{random.choice(keys)}={value()}" for _ in range(random.choice((0, 0, 1, 2)))]
    source = spoilt_yaml(random, random.choice(("recipes/*.yaml", "recipes/*.yaml", "params.yaml")))
    text = "\x1f".join(given).encode("utf-8", "replace")
    return {"recipe.yaml": source, "set.txt": text}


def _read_sweep(folder: Path) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    needed = ("prompts", "reward_model", "rollouts", "verdicts", "preferences", "dpo", "evaluate", "policy_gradient")
    sections = [one for one in re.split(r"(?m)^(?=[a-z_]+:)", text)[1:] if one.startswith(needed)]
    (folder / "params.yaml").write_text("".join(sections), encoding="utf-8")
    made = sweep.apply(folder / "sweep.yaml", file=folder / "made.yaml", params=folder / "params.yaml")
    holds(params.read_yaml(folder / "made.yaml") == made, "a sweep's points are others when read again")


def _read_over(folder: Path) -> None:
    entry = params.read_entry(f"{folder / _TOLD}:dpo")
    holds(isinstance(entry, dict), "no mapping")


def _lock(random: Random) -> Files:
    document = {"schema": "2.0", "stages": {"sft": {"cmd": "x", "deps": [{"path": "a", "md5": "b"}], "outs": []}}}
    text = _dumped(trees.changed(random, document)) if random.random() < 0.7 else random.choice(ODD)
    data = trees.octets(text)
    return {"dvc.lock": octets.spoilt(random, data, data) if random.random() < 0.4 else data}


def _read_lock(folder: Path) -> None:
    md5 = lineage.lock_entry_md5("sft", folder / "dvc.lock")
    holds(md5 == "" or len(md5) == 32, "no md5")


reader(
    name="params",
    make=lambda r: {"params.yaml": spoilt_yaml(r, "params.yaml", parts=2)},
    read=_read_params,
    weight=0.3,
)
reader(
    name="recipe",
    make=_recipe,
    read=_read_recipe,
    weight=0.01,
    places=("recipe.yaml", "rounds", "=", "tasks.recipe"),
)
reader(
    name="sweep",
    make=lambda r: {"sweep.yaml": spoilt_yaml(r, "recipes/sweeps/*.yaml", parts=9)},
    read=_read_sweep,
    weight=0.04,
    places=("sweep.yaml", "params.yaml"),
)
reader(name="over", make=lambda r: {_TOLD: spoilt_yaml(r, "params.yaml", parts=1)}, read=_read_over, weight=0.2)
reader(name="dvc.lock", make=_lock, read=_read_lock, weight=0.4)
