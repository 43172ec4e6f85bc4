"""Laws of files from others: what they hold does not run, and where they say they belong is not believed."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from rankwise.checkpoints import load_state
from rankwise.types import UserError
from tasks import weights
from tasks.judges import JudgeParams, make_judge
from tasks.params import below
from tasks.prompts import Files

ROOT = Path(__file__).parent.parent


class Marks:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "somebody-ran-me"


@pytest.fixture
def evil(mark) -> bytes:
    return pickle.dumps(Marks(mark))


@pytest.fixture
def project(tmp_path_factory, tmp_path) -> tiny.Project:
    return tiny.finished(tmp_path_factory.getbasetemp()).copy(tmp_path / "copy")


def test_the_pickle_of_these_tests_does_leave_a_mark(mark, evil):
    pickle.loads(evil).close()
    assert mark.exists()


# What is planted where a stage reads --------------------------------------------------------------------------------

PICKLES = ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth", "vocab.pkl")
PICKLES += ("adapter_model.bin", "tokenizer.pickle", "flax_model.msgpack", "tf_model.h5", "consolidated.00.pth")
CODE = "open({mark!r}, 'w').close()\nclass Own:\n    pass\n"


def plant(folder: Path, evil: bytes, mark: Path) -> None:
    """Pickles under every name that some library looks for, and code that the configurations name."""
    for name in PICKLES:
        (folder / name).write_bytes(evil)
    for name in ("modeling_own.py", "tokenization_own.py", "configuration_own.py", f"{folder.name}.py", "__init__.py"):
        (folder / name).write_text(CODE.format(mark=str(mark)))
    edit_json(
        folder / "config.json",
        auto_map={
            "AutoConfig": "configuration_own.Own",
            "AutoModelForCausalLM": "modeling_own.Own",
            "AutoModelForSequenceClassification": "modeling_own.Own",
        },
    )
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})


def files(**paths: str) -> dict[str, dict]:
    """Section prompts.files with these paths."""
    return {one.name: {"path": paths[one.name]} if one.name in paths else {} for one in fields(Files)}


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_is_planted_in_models_checkpoints_caches_and_data_never_runs(project, mark, evil):
    """Stages read folders that also hold a pickle of every common name, and code that configurations ask for."""
    mine = project.root / "data/source/mine"
    shutil.copytree(project.root / "models/base", mine)
    plant(mine, evil, mark)
    for made in ("models/base", "models/sft", "models/reward_model", "models/policy"):
        plant(project.root / made, evil, mark)
    kept = project.root / ".rankwise/checkpoints/sft"
    for folder in (kept, *kept.glob("*"), project.root / ".rankwise/stores", project.root / "data/prompts"):
        if folder.is_dir():
            for name in PICKLES:
                (folder / name).write_bytes(evil)
    rows = project.root / "data/source/rows"
    rows.mkdir()
    (rows / "rows.py").write_text(CODE.format(mark=str(mark)))
    (rows / "data.pkl").write_bytes(evil)
    (rows / "a.jsonl").write_text("".join(f'{{"prompt": "p{n}", "completion": " c{n}"}}\n' for n in range(60)))
    project.change(
        {"base_model": {"source": "mine"}, "prompts": {"source": "files", "files": files(sft="rows", rollout="rows")}}
    )
    for stage in ("prompts", "base_model"):
        assert project.run(stage).status == 0, stage
    project.change({"rollouts": {"seed": 5}, "sft": {"seed": 5}, "dpo": {"beta": 0.35}})
    for stage in ("sft", "rollouts", "verdicts", "preferences", "reference_logprobs", "dpo", "evaluate"):
        said = project.run(stage)
        assert said.status == 0, f"{stage}: {said.err}"
    assert not mark.exists()


@pytest.mark.parametrize("auto_map", [True, False], ids=["its own code", "a pickle alone"])
def test_a_model_that_needs_its_own_code_or_a_pickle_is_refused(project, mark, evil, auto_map):
    mine = project.root / "data/source/mine"
    shutil.copytree(project.root / "models/base", mine)
    plant(mine, evil, mark)
    if auto_map:
        edit_json(mine / "config.json", model_type="own")
    else:
        (mine / "model.safetensors").unlink()
    project.change({"base_model": {"source": "mine"}})
    said = project.run("base_model").error
    assert ("trust_remote_code" in said or "mine" in said) and not mark.exists()


def test_a_checkpoint_that_is_a_pickle_is_named_and_not_loaded(tmp_path, mark, evil):
    (tmp_path / "state.safetensors").write_bytes(evil)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_state(tmp_path / "state.safetensors")
    assert not mark.exists()


def test_a_table_whose_type_is_a_pickle_is_read_as_plain_values(tmp_path, mark, evil):
    """Arrow once unpickled the metadata of such a type as it opened a file."""
    from tasks.formats import records

    own = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": evil}
    schema = pa.schema([pa.field("prompt", pa.string(), metadata=own)])
    pq.write_table(pa.table({"prompt": ["a"]}, schema=schema), tmp_path / "rows.parquet")
    assert [record for _, record in records(tmp_path / "rows.parquet", split="", subset="")] == [{"prompt": "a"}]
    assert not mark.exists()


# Names that lead elsewhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/passwd", ".."])
def test_no_parameter_names_a_file_outside_its_folder(name, tmp_path):
    (tmp_path / "secret").write_text("{}")
    with pytest.raises(UserError, match=r"base_model\.source: .* so DVC could not see it change"):
        below(tmp_path / "source", name, where="base_model.source")
    paths = {"trained": tmp_path, "source": tmp_path / "source", "where": "verdicts.judge", "prefix": ""}
    for given in ({"kind": "stored", "verdicts": name}, {"kind": "reward_model", "model": name}):
        with pytest.raises(UserError, match=r"verdicts\.judge\.(verdicts|model): .*DVC could not see it change"):
            make_judge(JudgeParams(**given), **paths)


@pytest.mark.parametrize("stage", ["base_model", "prompts"])
def test_a_stage_that_is_told_such_a_name_says_so(project, stage):
    change = {
        "base_model": {"source": "../../copy"},
        "prompts": {"source": "files", "files": files(sft="../x")},
    }
    project.change({stage: change[stage]})
    assert "leads out of it, so DVC could not see it change" in project.run(stage).error


def test_a_link_in_the_folder_may_lead_elsewhere(tmp_path):
    """That is how data get there: `make run DATA=…` links them."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "mine").symlink_to(tmp_path)
    assert below(tmp_path / "source", "mine", where="x") == tmp_path / "source" / "mine"


# What a registered version says of itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("md5", ["../../x.dir", "/etc/x.dir", f"{'0' * 31}/.dir", "0" * 32, ""])
def test_a_versions_md5_is_an_md5(md5, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match="32 hex digits"):
        weights.find(md5, tmp_path / "policy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../../../escaped", "/tmp/rankwise-escaped", "a/../../b"])
def test_no_listing_of_dvcs_cache_puts_a_file_outside_its_folder(name, tmp_path, monkeypatch):
    cache = tmp_path / "cache/files/md5"
    body = hashlib.md5(b"x").hexdigest()
    listing = json.dumps([{"md5": body, "relpath": name}]).encode()
    md5 = f"{hashlib.md5(listing).hexdigest()}.dir"
    for digest, data in ((body, b"x"), (md5, listing)):
        (cache / digest[:2]).mkdir(parents=True)
        (cache / digest[:2] / digest[2:]).write_bytes(data)
    monkeypatch.setattr(weights, "_dvc", lambda *_: str(tmp_path / "cache"))
    monkeypatch.setenv("RANKWISE_HOME", str(tmp_path / "home"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="names a file outside its folder"):
        weights.find(md5, tmp_path / "policy")
    made = {tmp_path / "home", tmp_path / "home/models"}
    assert set(tmp_path.rglob("*")) - set(before) <= made and not Path("/tmp/rankwise-escaped").exists()


def test_what_a_version_says_of_itself_is_no_option_of_dvcs(tmp_path, monkeypatch):
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(weights, "_dvc", lambda *words: asked.append(words))
    monkeypatch.setenv("RANKWISE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="not to be had"):
        weights.find(f"{'0' * 32}.dir", Path("--remote-config=x"), revisions=["--upload-pack=x"])
    got = next(words for words in asked if words[0] == "get")
    assert got[-3:] == ("--", ".", "--remote-config=x") and "--rev=--upload-pack=x" in got


# What DVC restores --------------------------------------------------------------------------------------------------


def test_no_listing_makes_dvc_write_outside_its_folder(tmp_path):
    """A folder's listing, as a remote may hold it, names a file two folders up. DVC's own command writes it."""
    script = """
import hashlib, json, pathlib, re, shutil, sys
from dvc.cli import main
assert main(["init", "-q", "--no-scm"]) == 0
pathlib.Path("d").mkdir(); pathlib.Path("d/a").write_text("a")
assert main(["add", "-q", "d"]) == 0
cache, (note,) = pathlib.Path(".dvc/cache/files/md5"), [pathlib.Path("d.dvc")]
found = re.search("[0-9a-f]{32}[.]dir", note.read_text())[0]
old = cache / found[:2] / found[2:]
listing = json.loads(old.read_text()); listing[0]["relpath"] = "../../escaped"
data = json.dumps(listing).encode(); new = hashlib.md5(data).hexdigest() + ".dir"
(cache / new[:2]).mkdir(exist_ok=True); (cache / new[:2] / new[2:]).write_bytes(data)
note.write_text(note.read_text().replace(found, new)); shutil.rmtree("d")
if "guarded" in sys.argv:
    from flows.guarded_dvc import guard
    guard()
raise SystemExit(main(["checkout", "d.dvc"]))
"""
    done = {}
    for how in ("plain", "guarded"):
        (tmp_path / how / "repo").mkdir(parents=True)
        environment = {"PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1", "HOME": str(tmp_path), "PATH": ""}
        done[how] = subprocess.run(
            [sys.executable, "-c", script, how],
            cwd=tmp_path / how / "repo",
            env=environment | {"DVC_SITE_CACHE_DIR": str(tmp_path / how / "site")},
            capture_output=True,
            text=True,
        )
    assert (tmp_path / "plain/escaped").exists(), (
        "DVC has mended it: flows/guarded_dvc.py may go\n" + done["plain"].stderr
    )
    assert not (tmp_path / "guarded/escaped").exists() and done["guarded"].returncode != 0
    assert "names a file outside its folder" in done["guarded"].stderr
