"""Identities change with every byte that matters and with nothing else."""

import math
import shutil

import pytest
from test_rendering import tokenizer
from test_scoring import tiny

from rankwise.checkpoints import save_model
from rankwise.fingerprint import digest, file_digest, tokenizer_digest, weights_digest
from rankwise.types import UserError


@pytest.fixture
def folder(tmp_path):
    save_model(tiny(), tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def test_digest_knows_values_and_not_spelling():
    assert digest("a", [1, 2], {"x": 1, "y": None}) == digest("a", (1, 2), {"y": None, "x": 1})
    different = [
        digest("ab"),
        digest("a", "b"),
        digest(["a", "b"]),
        digest("b", "a"),
        digest(1),
        digest("1"),
        digest(1.5),
    ]
    assert len(set(different)) == len(different) and all(len(d) == 32 for d in different)
    assert digest("\ud800") != digest("\ud801")  # broken text from a tokenizer must not stop a run
    with pytest.raises(ValueError):
        digest(math.nan)


def test_a_file_is_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    (tmp_path / "b").write_bytes(b"x" * 3_000_000)
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "b")
    (tmp_path / "b").write_bytes(b"x" * 2_999_999 + b"y")
    assert file_digest(tmp_path / "a") != file_digest(tmp_path / "b")


def test_a_folder_keeps_its_identity_when_it_moves(folder, tmp_path):
    before = weights_digest(folder), tokenizer_digest(folder)
    shutil.copytree(folder, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "README.md").write_text("notes")
    assert (weights_digest(tmp_path / "elsewhere"), tokenizer_digest(tmp_path / "elsewhere")) == before


def test_one_weight_changes_the_weights_and_not_the_tokenizer(folder, tmp_path):
    model = tiny()
    model.model.norm.weight.data[3] += 1e-3
    save_model(model, tokenizer(), tmp_path / "other")
    assert weights_digest(tmp_path / "other") != weights_digest(folder)
    assert tokenizer_digest(tmp_path / "other") == tokenizer_digest(folder)


def test_how_the_model_computes_is_part_of_it(folder):
    before = weights_digest(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert '"rms_norm_eps": 1e-05' in config.read_text() and weights_digest(folder) != before


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"],
)
def test_every_file_of_a_tokenizer_counts(folder, name):
    before = tokenizer_digest(folder)
    with open(folder / name, "a") as file:
        file.write(" ")
    assert tokenizer_digest(folder) != before


def test_a_folder_without_weights_has_no_identity(tmp_path):
    """Two such folders, or two hub ids taken for folders, would share one, and each other's rows."""
    with pytest.raises(UserError, match="a model folder is expected"):
        weights_digest(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a model folder is expected"):
        tokenizer_digest(tmp_path)
