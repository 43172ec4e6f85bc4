"""Laws of reuse: what stores and checkpoints hold serves a run only where that run would have made the very same.

The whole walk, over every parameter, is a command: tests/walk.py. Here is the rest of what a result depends on, files
changed under a stage's feet, and that the walk would see a wrong hit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import walk
from safetensors.numpy import load_file, save_file

from rankwise.rows import read_rows, write_rows
from rankwise.types import Message, Row
from tasks import rounds
from tasks.recipe import STAGES


@pytest.fixture(scope="module")
def walker(tmp_path_factory) -> walk.Walk:
    return walk.Walk(tiny.finished(tmp_path_factory.getbasetemp()), tmp_path_factory.mktemp("walk"))


# Changes


def in_place(path: Path, text: Callable[[bytes], bytes]) -> None:
    """Other bytes under the same name, and no younger than before: what a file's time would not tell."""
    about = path.stat()
    path.write_bytes(text(path.read_bytes()))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def weights(folder: str) -> Callable[[tiny.Project], None]:
    def change(project: tiny.Project) -> None:
        path = project.root / folder / "model.safetensors"
        about, tensors = path.stat(), load_file(path)
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.5)
        save_file(tensors, path, {"format": "pt"})
        assert path.stat().st_size == about.st_size
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))

    return change


def tokenizer(folder: str) -> Callable[[tiny.Project], None]:
    """Common tokens change places."""

    def swapped(text: bytes) -> bytes:
        made = json.loads(text)
        vocabulary = made["model"]["vocab"]
        named = sorted((name for name in vocabulary if name.startswith("Ġ")), key=vocabulary.get)
        for one, other in zip(named[::2], named[1::2]):
            vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        return json.dumps(made, ensure_ascii=False).encode()

    return lambda project: in_place(project.root / folder / "tokenizer.json", swapped)


def epsilon(project: tiny.Project) -> None:
    """The same weights, computed with otherwise."""

    def other(text: bytes) -> bytes:
        return json.dumps({**json.loads(text), "rms_norm_eps": 0.01}).encode()

    in_place(project.root / "models/sft/config.json", other)


def end_tokens(project: tiny.Project) -> None:
    """A hundred more tokens that end an answer."""
    path = project.root / "models/sft/generation_config.json"
    made = json.loads(path.read_text())
    path.write_text(json.dumps({**made, "eos_token_id": [made["eos_token_id"], *range(100, 200)]}))


def turns(template: str) -> Callable[[tiny.Project], None]:
    """Prompts become turns, and the model's template puts them into words."""

    def change(project: tiny.Project) -> None:
        asked(lambda row: dataclasses.replace(row, prompt=(Message(role="user", content=row.prompt[0].content),)))(
            project
        )
        (project.root / "models/sft/chat_template.jinja").write_text(template)

    return change


def rows(table: str, changed: Callable[[Row], Row]) -> Callable[[tiny.Project], None]:
    def change(project: tiny.Project) -> None:
        path = project.root / table
        write_rows(path, map(changed, read_rows(path)))

    return change


asked = functools.partial(rows, "data/prompts/rollout.parquet")


def reversed_answers(row: Row) -> Row:
    return dataclasses.replace(row, answers=row.answers[::-1])


def one_letter(row: Row) -> Row:
    first = dataclasses.replace(row.answers[0], text=row.answers[0].text + "s")
    return dataclasses.replace(row, answers=(first, *row.answers[1:]))


def one_token(row: Row) -> Row:
    first = dataclasses.replace(row.answers[0], token_ids=(*row.answers[0].token_ids[:-1], 7))
    return dataclasses.replace(row, answers=(first, *row.answers[1:]))


def other_ranks(row: Row) -> Row:
    ranks = [answer.rank for answer in row.answers]
    answers = (dataclasses.replace(answer, rank=rank) for answer, rank in zip(row.answers, ranks[::-1]))
    return dataclasses.replace(row, answers=tuple(answers))


def judged_by(text: str) -> Callable[[tiny.Project], None]:
    """A function judges, whose file is overwritten in place."""

    def change(project: tiny.Project) -> None:
        (project.root / "recipes/judges.py").write_text(f"def score(prompt, answer):\n    return {text}\n")
        os.utime(project.root / "recipes/judges.py", (1e9, 1e9))
        project.change({"verdicts": {"judge": walk.FUNCTION | {"function": "recipes.judges:score"}}})

    return change


PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
BRACKETS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
ANSWERING, SCORING = ["rollouts"], ["verdicts", "audit_judge"]
CHANGES = {  # what is changed, and the stages that see it
    "reference weights": (weights("models/sft"), ["rollouts"]),
    "reference weights, log-probs": (weights("models/sft"), ["reference_logprobs"]),
    "reference weights, evaluation": (weights("models/sft"), ["evaluate"]),
    "policy weights": (weights("models/policy"), ["diagnosis", "evaluate"]),
    "judge weights": (weights("models/reward_model"), [*SCORING, "evaluate"]),
    "how the model computes": (epsilon, ["rollouts"]),
    "how it computes log-probs": (epsilon, ["reference_logprobs"]),
    "end tokens": (end_tokens, ANSWERING),
    "tokenizer": (tokenizer("models/sft"), ["rollouts"]),
    "tokenizer, log-probs": (tokenizer("models/sft"), ["reference_logprobs"]),
    "judge tokenizer": (tokenizer("models/reward_model"), SCORING),
    "template": (turns(PLAIN), ANSWERING),
    "another template": (turns(BRACKETS), ANSWERING),
    "order of answers, verdicts": (rows("data/rollouts.parquet", reversed_answers), SCORING),
    "order of answers, log-probs": (rows("data/preferences.parquet", reversed_answers), ["reference_logprobs"]),
    "a letter of an answer, verdicts": (rows("data/rollouts.parquet", one_letter), SCORING),
    "a token of an answer, log-probs": (rows("data/preferences.parquet", one_token), ["reference_logprobs"]),
    "ranks": (rows("data/preferences.parquet", other_ranks), ["reference_logprobs", "dpo"]),
    "judge's function": (judged_by("len(answer)"), ["verdicts"]),
    "judge's function, another": (judged_by("len(prompt)"), ["verdicts"]),
    "beta": (lambda project: project.change({"dpo": {"beta": 0.7}}), ["dpo", "diagnosis", "evaluate"]),
    "K": (lambda project: project.change({"rollouts": {"k": 3}}), ANSWERING),
    "length limit": (
        lambda project: project.change({"reference_logprobs": {"max_prompt_tokens": 3}}),
        ["reference_logprobs"],
    ),
    "dtype": (lambda project: project.change({"reference_logprobs": {"precision": "bf16"}}), ["reference_logprobs"]),
}


def test_unchanged_every_stage_is_served_and_makes_the_same(walker):
    """Else the laws below would compare a cold run with another."""
    for stage, said in {
        "rollouts": "0 of 24 prompts answered now",
        "verdicts": "0 verdicts asked now",
        "reference_logprobs": "0 of 24 rows computed now",
    }.items():
        assert said in walker.warm.run(stage).out
        [step] = walker.step("nothing", [stage], lambda project: None)
        assert not (step.wrong or step.rounded or step.refused or step.changed)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_warm_is_cold(walker, name):
    change, stages = CHANGES[name]
    steps = walker.step(name, stages, change)
    assert [step.wrong for step in steps if step.wrong] == []
    assert any(step.changed or step.refused for step in steps), "the change was no change"


@pytest.mark.parametrize(
    "stage, key, change",
    [
        ("rollouts", "rankwise.rollouts:weights_digest", weights("models/sft")),
        ("verdicts", "rankwise.judges:weights_digest", weights("models/reward_model")),
        ("reference_logprobs", "tasks.reference_logprobs:weights_digest", weights("models/sft")),
    ],
)
def test_the_walk_finds_a_key_that_leaves_something_out(walker, stage, key, change):
    blind = functools.partial(blinded, key)
    walker.step("nothing", [stage], lambda project: None, before=blind)  # rows under the blind key
    [step] = walker.step("weights", [stage], change, before=blind)
    assert "data/" in step.wrong


def blinded(target: str) -> None:
    """A `before` under which all weights are alike."""
    import importlib

    import rankwise.fingerprint

    rankwise.fingerprint.weights_digest = lambda folder: "alike"
    module, _, name = target.partition(":")
    setattr(importlib.import_module(module), name, lambda folder: "alike")


# Parameters


def reading(log: str) -> None:
    """A `before` that writes down each section of params.yaml that the stage reads."""
    load = rounds.load

    def noting(path, name, *more, **named):
        with open(log, "a") as file:
            file.write(f"{name}\n")
        return load(path, name, *more, **named)

    rounds.load = noting


def test_a_stage_reads_the_sections_that_dvc_watches_for_it_and_no_other(walker, tmp_path):
    """So a changed parameter starts the stages that depend on it, and nothing else."""
    told = []
    for stage in STAGES:
        log = tmp_path / stage
        assert walker.warm.run(stage, before=functools.partial(reading, str(log))).status == 0
        read = set(log.read_text().split())
        watched = {key.split(".")[0] for key in walk.GRAPH[stage].get("params", ())} - {"rounds"}
        if read != watched:
            told.append(f"stage {stage} reads {sorted(read)}, dvc.yaml says {sorted(watched)}")
    assert not told, "\n".join(told)


def test_the_walk_goes_over_every_parameter():
    import yaml

    shipped = yaml.safe_load((tiny.ROOT / "params.yaml").read_text())
    walked = {section for section in shipped if section in STAGES}
    for section in walked:
        found = walk.leaves(section)
        assert {leaf.path[0] for leaf in found} == set(shipped[section])
        unmoved = [str(leaf) for leaf in found if not leaf.others]
        assert unmoved == [], "give these another value in walk.OTHERS"
