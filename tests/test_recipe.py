"""Laws of params.yaml and of recipes: what is shipped is what the stages declare, and a mistake changes no file."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from rankwise.types import UserError
from tasks import params, recipe, rounds
from tasks.recipe import BESIDE, STAGES
from tasks.rollouts import TeacherParams

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
HEAVY = ("torch", "transformers", "mlflow", "pandas", "matplotlib", "prefect", "dvc", "datasets")


def params_type(stage: str) -> type:
    return importlib.import_module(f"tasks.{stage}").Params


def names(of: type) -> set[str]:
    """Every parameter of a stage, nested ones by their own name."""
    found = set()
    for spec in fields(of):
        default = params.default_of(spec)
        found |= {spec.name} | (names(type(default)) if is_dataclass(default) else set())
    return found


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with the default params.yaml and an empty data/source."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/source").mkdir(parents=True)
    recipe.apply(None)
    return tmp_path


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tasks.recipe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


# What is shipped


def test_params_yaml_is_what_the_stages_declare():
    assert (ROOT / "params.yaml").read_text() == recipe.render({}), "run: python -m tasks.recipe"


@pytest.mark.parametrize("stage", [*STAGES, *BESIDE])
def test_what_is_written_reads_back_as_the_default(project, stage):
    assert params.load(Path("params.yaml"), stage, params_type(stage)) == params_type(stage)()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_the_stages(project, path):
    recipe.apply(path)
    overlay = yaml.safe_load(path.read_text())
    read = yaml.safe_load(Path("params.yaml").read_text())
    for section, values in overlay.items():
        if section == "rounds":
            rounds.check(read, "params.yaml")
        else:
            params.load(Path("params.yaml"), section, params_type(section))
        for key, value in values.items():
            assert read[section][key] == value or read[section][key].items() >= value.items()
    assert str(path.relative_to(ROOT)) in path.read_text(), "its head says how to use it"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_a_recipe_names_is_there(path):
    """Judge functions and rubrics; data and models are the user's to give (--data)."""
    read = yaml.safe_load(recipe.render(yaml.safe_load(path.read_text())))
    for judge in (read["verdicts"]["judge"] or {}, read["evaluate"]["judge"], read["evaluate"]["gold"] or {}):
        if judge.get("kind") == "callable":
            module, _, name = judge["function"].partition(":")
            assert callable(getattr(importlib.import_module(module), name))
        assert (ROOT / judge.get("rubric", "")).exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_stages_that_must_agree_do(path):
    """Length limits of stages that look at the same tokens, and the judge that made the labels."""
    read = yaml.safe_load(recipe.render(yaml.safe_load(path.read_text())))
    assert read["rollouts"]["max_prompt_tokens"] in (read["evaluate"]["max_prompt_tokens"], 0)
    assert read["reference_logprobs"]["precision"] == read["dpo"]["precision"]
    if read["prompts"]["files"]["rollout"]:
        assert read["verdicts"]["judge"] == read["evaluate"]["judge"]


# Merging


def test_a_section_that_is_null_by_default_starts_from_its_own_defaults():
    """A teacher: what the recipe leaves out, its own dataclass says; written out, key by key, as any section."""
    text = recipe.render({"rollouts": {"k": 1, "teacher": {"model": "big", "k": 3}}})
    teacher = yaml.safe_load(text)["rollouts"]["teacher"]
    assert teacher == {**asdict(TeacherParams()), "model": "big", "k": 3}
    assert "\n    model: big  " in text
    assert yaml.safe_load(recipe.render({}))["rollouts"]["teacher"] is None


def test_sections_merge_and_mappings_are_replaced():
    read = yaml.safe_load(
        recipe.render(
            {
                "prompts": {"embedded": {"sft": 7}, "files": {"sft": {"path": "a.jsonl"}}},
                "register": {"at_least": {"kl.mean": 0.1}},
            }
        )
    )
    assert read["prompts"]["embedded"] == {
        "sft": 7,
        "rollout": 2000,
        "eval": 300,
        "labelled": 2000,
        "labelled_test": 300,
    }
    assert read["prompts"]["files"]["sft"] == {"path": "a.jsonl"} and read["prompts"]["files"]["rollout"] == {}
    assert read["register"]["at_least"] == {"kl.mean": 0.1}, "the default gate would still be there"


def test_null_is_a_value():
    assert yaml.safe_load(recipe.render({"evaluate": {"gold": None}}))["evaluate"]["gold"] is None


def test_lists_are_replaced():
    read = yaml.safe_load(recipe.render({"dpo": {"lora": {"rank": 8, "targets": ["c_attn"]}}}))
    assert read["dpo"]["lora"] == {"rank": 8, "alpha": 16.0, "targets": ["c_attn"]}


@pytest.mark.parametrize("value", [5e-07, 1e-05, 0.1, 1e22, 3.0])
def test_numbers_survive_yaml(value):
    """YAML 1.1 reads 5e-07 as text."""
    read = yaml.safe_load(recipe.render({"dpo": {"learning_rate": value}}))
    assert read["dpo"]["learning_rate"] == value


@pytest.mark.parametrize("text", ["null", "yes", "a: b", "# no comment", " spaces ", "ünï", "with 'quotes'", "1e3"])
def test_texts_survive_yaml(text):
    assert yaml.safe_load(recipe.render({"register": {"name": text}}))["register"]["name"] == text


# Mistakes


MISTAKES = {
    "unknown section": ("dop:\n  beta: 0.3\n", "no stage is called 'dop'; did you mean 'dpo'?"),
    "unknown key": ("dpo:\n  betta: 0.3\n", "dpo.betta: no such parameter; did you mean 'beta'?"),
    "unknown nested key": ("dpo:\n  lora: {rnk: 4}\n", "dpo.lora.rnk: no such parameter; did you mean 'rank'?"),
    "wrong type": ("dpo:\n  beta: strong\n", "dpo.beta: float was expected, found 'strong'"),
    "text for a number": ("dpo:\n  learning_rate: 5e-7\n", "write it with a point: 5.0e-07"),
    "value for a section": ("dpo: 3\n", "dpo: a mapping was expected, found 3"),
    "a list of sections": ("- dpo\n", "a mapping of sections was expected"),
    "no yaml": ("dpo: {beta: 0.3\n", "not readable as YAML"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_params_stay_as_they_were(project, mistake):
    text, message = MISTAKES[mistake]
    before = Path("params.yaml").read_text()
    told = run(str(written(project / "mine.yaml", text)))
    assert told.returncode == 2 and told.stdout == "" and "Traceback" not in told.stderr
    assert told.stderr.startswith("error: ") and message in told.stderr and "mine.yaml" in told.stderr
    assert Path("params.yaml").read_text() == before


def test_a_recipe_that_is_not_there(project):
    told = run("recipes/imbd.yaml")
    assert told.returncode == 2 and told.stderr.startswith("error: recipes/imbd.yaml: no such file")


# The command


def test_the_changes_are_shown(project):
    told = run(str(written(project / "mine.yaml", "dpo:\n  beta: 0.3\n")))
    shown = [line.partition("#")[0].strip() for line in told.stdout.splitlines()]
    assert told.returncode == 0 and shown == ["-  beta: 0.2", "+  beta: 0.3"]
    again = run("mine.yaml")
    assert again.stdout == "params.yaml is unchanged\n"
    assert "+  beta: 0.2" in run().stdout, "no recipe: the default again"


def test_an_empty_recipe_is_the_default(project):
    before = Path("params.yaml").read_text()
    assert run(str(written(project / "empty.yaml", ""))).returncode == 2
    assert run(str(written(project / "empty.yaml", "{}\n"))).returncode == 0
    assert Path("params.yaml").read_text() == before


def test_data_is_linked_under_its_own_name_and_renewed(project, tmp_path):
    first, second = tmp_path / "one" / "reviews", tmp_path / "two" / "reviews"
    for folder in (first, second):
        folder.mkdir(parents=True)
    assert run("--data", str(first)).stdout.startswith("linked data/source/reviews")
    assert Path("data/source/reviews").resolve() == first
    run("--data", str(second))
    assert Path("data/source/reviews").resolve() == second


def test_data_of_the_users_own_is_never_replaced(project, tmp_path):
    mine, other = project / "data/source/mine.jsonl", tmp_path / "other" / "mine.jsonl"
    mine.write_text("precious")
    other.parent.mkdir()
    other.write_text("other")
    told = run("--data", str(other))
    assert told.returncode == 2 and "is there already and is no link" in told.stderr
    assert mine.read_text() == "precious"


def test_data_that_is_not_there_links_nothing(project):
    (project / "there").mkdir()
    told = run("--data", "there", "nowhere")
    assert told.returncode == 2 and "--data nowhere: no such file or folder" in told.stderr
    assert list((project / "data/source").iterdir()) == []


def test_links_work_from_a_clone_without_data(tmp_path, monkeypatch):
    """data/source holds nothing that git keeps but a note; a clone may lack it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews").mkdir()
    with pytest.raises(UserError, match="no such"):
        recipe.link_sources([Path("nowhere")])
    recipe.link_sources([Path("reviews")])
    assert Path("data/source/reviews").is_dir()


# Help


@pytest.mark.parametrize("stage", [*STAGES, *BESIDE, "recipe"])
def test_help_is_quick_and_whole(stage, tmp_path):
    """Anywhere, without params.yaml, without the seconds that torch takes to import; every parameter is there."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['tasks.{stage}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('tasks.{stage}', run_name='__main__', alter_sys=True)\n"
        "finally:\n"
        f"    print('heavy:', [name for name in {HEAVY} if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    shown, _, heavy = told.stdout.partition("heavy: ")
    assert heavy == "[]\n"
    assert f"usage: python -m tasks.{stage}" in shown
    if stage == "rollouts":
        assert "teacher: a larger model that answers too (aSFT); null: none (default: null)\n    " in shown
        assert "\n    model " in shown and "\n  model " not in shown
    if stage != "recipe":
        assert names(params_type(stage)) <= {word.strip(":,") for word in shown.split()}
    assert list(tmp_path.iterdir()) == [], "asking for help left files"
