"""Laws of the documentation: what README and docs name exists, and what is generated is what the generator gives.

Names are looked up in the source text (ast), so nothing heavy is imported.
"""

from __future__ import annotations

import ast
import functools
import re
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import unrolled
import yaml

from tasks import parameters, promote, recipe, sweep
from tasks.doctor import Stops
from tasks.params import default_of
from tasks.sources import File

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
PIPELINE = ("rankwise", "tasks", "flows", "recipes")
PACKAGES = (*PIPELINE, "benchmarks")
MADE = ("data/", "models/", "reports/", ".rankwise/", ".dvc/")  # by a run; not in a fresh clone
SYMBOL = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:[.:]\w+)+")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# What a page says


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [
        textwrap.dedent(found[2])
        for found in re.finditer(r"^( *)```" + language + r"\n(.*?)^\1```", text_of(page), re.M | re.S)
    ]


def spans(page: Path) -> set[str]:
    """What stands between single backticks, outside fenced blocks."""
    prose = re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.M | re.S)
    return set(re.findall(r"`([^`\n]+)`", prose))


def commands(page: Path) -> list[str]:
    """Lines of shell blocks without their comments, and spans."""
    lines = [line.split("  #")[0].strip() for block in blocks(page, "sh") for line in block.splitlines()]
    return [*lines, *spans(page)]


def anchor(heading: str) -> str:
    """A heading's anchor as git hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# What the repository has


@functools.cache
def runs(module: str) -> bool:
    """Whether `python -m module` finds something to run."""
    path = ROOT / Path(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def names_in(module: str) -> frozenset[str] | None:
    """The top-level names of a module of ours; None where there is no such module."""
    path = ROOT / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        return None
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return frozenset(found)


def exists(dotted: str) -> bool:
    """Whether "package.module", "package.module.name" or "package.module:name" is there."""
    module, _, name = dotted.replace(":", ".").rpartition(".")
    if names_in(dotted) is not None or (ROOT / Path(*dotted.split("."))).is_dir():
        return True
    own = names_in(module)
    return own is not None and name in own


@functools.cache
def laws() -> frozenset[str]:
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").glob("test_*.py"))
    return frozenset(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def stages() -> dict[str, dict]:
    return unrolled.one_round()


def reads(stage: dict) -> set[str]:
    """What a stage reads beside the project's modules."""
    return {dep for dep in stage["deps"] if not re.match(r"(rankwise|tasks)/", dep)}


def writes(stage: dict) -> set[str]:
    """What a stage writes, metrics and plots included."""
    given = [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]
    return {next(iter(one)) if isinstance(one, dict) else one for one in given}


def parameter_names(value: object, prefix: str = "") -> set[str]:
    if not isinstance(value, dict):
        return set()
    own = {f"{prefix}{key}" for key in value}
    return own.union(*(parameter_names(item, f"{prefix}{key}.") for key, item in value.items()))


def environment_variables() -> set[str]:
    """Every variable that the code asks for by name."""
    asked: set[str] = set()
    for path in [path for package in PIPELINE for path in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            key = None
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "os.environ.get",
                "os.environ.setdefault",
                "os.getenv",
            ):
                key = node.args[0]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                key = node.slice
            elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
                key = node.left
            if isinstance(key, ast.Constant):
                asked.add(key.value)
    return asked


# Laws


def test_the_parameter_reference_is_what_the_dataclasses_say():
    """To mend: python -m tasks.parameters > docs/parameters.md"""
    assert text_of(ROOT / "docs" / "parameters.md") == parameters.reference()


@pages
def test_links_lead_somewhere(page):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists():
            dead.append(target)
        elif heading:
            headings = re.findall(r"^#+ (.+)$", text_of(file), re.M)
            dead += [] if heading in map(anchor, headings) else [target]
    assert not dead


@pages
def test_every_module_run_by_a_command_exists(page):
    named = {
        name for line in commands(page) for name in re.findall(r"-m ((?:tasks|flows|rankwise|benchmarks)[\w.]*)", line)
    }
    missing = {name for name in named if name not in ("tasks.NAME", "benchmarks.NAME") and not runs(name)}
    assert not missing


@pages
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = {found[1] for line in commands(page) if (found := re.match(r"make ([a-z]+)", line))}
    assert named <= targets


@pages
def test_every_function_and_class_named_exists(page):
    missing = {span for span in spans(page) if SYMBOL.fullmatch(span) and span != "tasks.NAME" and not exists(span)}
    assert not missing


@pages
def test_every_test_named_exists(page):
    assert set(re.findall(r"\btest_\w+(?!\.py)\b", re.sub(r"test_\w+\.py", "", text_of(page)))) <= laws()


@pages
def test_every_file_named_is_there_or_is_made_by_a_stage(page):
    two_rounds = unrolled.stages(yaml.safe_load(recipe.render({"rounds": {"count": 2}})))
    made = {out for stage in two_rounds.values() for out in writes(stage)}
    missing = []
    for span in spans(page):
        if not re.fullmatch(r"[\w.\-]+(/[\w.\-]*)+|[\w\-]+\.(?:ya?ml|py|md|toml|txt)", span) or "NAME" in span:
            continue
        path = span.rstrip("/")
        if path.startswith(MADE) or f"{path}/" in MADE:
            known = path.startswith(f"{promote.REPORT}/") or any(
                out == path or out.startswith(f"{path}/") or path.startswith(f"{out}/") for out in made
            )
            if not (known or path.startswith((".rankwise", ".dvc", "data/source")) or path == "data"):
                missing.append(span)
        elif not (ROOT / path).exists() and span not in ("owner/name", "dvc.lock", "pointer.json", "infra/.env"):
            missing.append(span)
    assert not missing


@pages
def test_every_parameter_named_exists(page):
    known = parameter_names(yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")))
    sections = "|".join(recipe.SECTIONS)
    named = {span for span in spans(page) if re.fullmatch(rf"(?:{sections})(?:\.[a-z_0-9]+)+", span)}
    named |= {name for line in commands(page) for name in re.findall(r"-S ([a-z_.]+)=", line)}
    assert named <= known


@pages
def test_every_recipe_and_sweep_shown_is_accepted(page, tmp_path):
    for block in blocks(page, "yaml"):
        given = yaml.safe_load(block)
        if "methods" in given:
            (tmp_path / "sweep.yaml").write_text(block)
            sweep.apply(tmp_path / "sweep.yaml", file=tmp_path / "params.yaml", params=ROOT / "params.yaml")
        else:
            recipe.render(given, where=page.name)


def test_the_picture_is_the_graph():
    """README draws the edges of dvc.yaml, those left out that follow from others."""
    made = {out: name for name, stage in stages().items() for out in writes(stage)}
    before = {name: {made[dep] for dep in reads(stage) if dep in made} for name, stage in stages().items()}

    @functools.cache
    def ancestors(name: str) -> frozenset[str]:
        return frozenset(before[name]).union(*(ancestors(up) for up in before[name]))

    edges = {
        (up, name)
        for name, ups in before.items()
        for up in ups
        if not any(up in ancestors(other) for other in ups - {up})
    }
    (picture,) = blocks(ROOT / "README.md", "mermaid")
    drawn = re.findall(r"(\w+)(?:\[[^\]]*\])? --> (\w+)", picture)
    assert set(drawn) == edges and len(drawn) == len(edges)


def test_the_table_of_stages_is_dvc_yaml():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", text_of(ROOT / "docs" / "design.md"), re.M)
    told = {name: (set(re.findall(r"`([^`]+)`", a)), set(re.findall(r"`([^`]+)`", b))) for name, a, b in rows}
    assert told == {
        name: (reads(stage), {next(iter(o)) if isinstance(o, dict) else o for o in stage["outs"]})
        for name, stage in stages().items()
    }


def test_the_doctors_findings_are_told_with_their_thresholds():
    told = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", text_of(ROOT / "docs" / "data.md"), re.M)
    assert told == [(spec.name, str(default_of(spec))) for spec in fields(Stops)]


def test_every_entry_of_a_file_is_told():
    said = text_of(ROOT / "docs" / "data.md")
    assert [spec.name for spec in fields(File) if not re.search(rf"`{spec.name}\b", said)] == []


def test_environment_variables_told_are_those_that_the_code_reads():
    page = text_of(ROOT / "docs" / "operate.md")
    told = set(re.findall(r"^\| `([A-Z_]+)` \|", page, re.M))
    assert environment_variables() - told == set()
    source = "\n".join(path.read_text(encoding="utf-8") for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
    assert {name for name in told if name not in source} == set()


def test_what_the_flow_sets_is_told():
    from flows import ENVIRONMENT

    page = text_of(ROOT / "docs" / "operate.md")
    assert [name for name in ENVIRONMENT if name not in page and "LOGGING_FORMATTERS" not in name] == []
