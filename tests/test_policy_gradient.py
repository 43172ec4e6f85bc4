"""RLHF by TRL's RLOOTrainer is E10: its gradient, reward, reference and tokens; and the mistakes that are refused."""

from __future__ import annotations

import copy
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_rendering import CHATML, chat
from test_rendering import tokenizer as byte_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from benchmarks.toy_space import Listed, World, make, measures
from benchmarks.toy_training import minus_e1, rloo_loss
from rankwise.checkpoints import load_causal_lm, load_tokenizer, save_model
from rankwise.rendering import Renderer
from rankwise.rows import read_rows, write_rows
from rankwise.types import Answer, Row, UserError, text_prompt
from rankwise.verdicts import read_verdicts
from tasks import rloo
from tasks.judges import JudgeParams, make_judge
from tasks.policy_gradient import Params, rewards

# The toy world, as a folder


@pytest.fixture(scope="module")
def world() -> World:
    return make(seed=1, letters=2, longest=2, prompts=2)


def letters() -> PreTrainedTokenizerFast:
    """The toy world's tokens: a letter each, and the end, which pads too."""
    inner = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2}, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "sft"
    save_model(copy.deepcopy(world.model).float(), letters(), path)
    return path


class Trained:
    """A run of the trainer in the toy world, and what it drew in its last step."""

    def __init__(self, world: World, folder: Path, *, seed: int = 0, **values):
        self.world, self.drawn, self.points = world, [], []
        params = Params(**{"max_new_tokens": 2, "prompts_per_step": 2, "max_grad_norm": 0.0, "seed": seed, **values})
        params = replace(params, micro_batch_answers=values.get("micro_batch_answers", 2 * params.samples))
        made = load_tokenizer(folder)
        self.trainer = rloo.make_trainer(
            folder,
            made,
            ["".join(made.convert_ids_to_tokens(row.prompt_ids)) for row in world.rows],
            self.reward,
            params,
            folder=folder.parent / "trl",
            told=lambda step, values: self.points.append(values),
        )

    def reward(self, numbers, completions) -> list[float]:
        places = [self.world.rows[0].answers_ids.index(tuple(ids)) for ids in completions]
        self.drawn = list(zip(numbers, places))
        return [self.world.reward_XY[x, y].item() for x, y in self.drawn]

    def listed(self) -> Listed:
        """The policy as it is now, in float64."""
        model = copy.deepcopy(self.world.model)
        model.load_state_dict(self.trainer.model.state_dict())
        return Listed(model, self.world.rows)

    def samples(self) -> torch.Tensor:
        """[X, G]: the answers drawn for each prompt in the last step."""
        return torch.tensor([[y for x, y in self.drawn if x == prompt] for prompt in range(len(self.world.rows))])


class BeforeOptimizer(TrainerCallback):
    def __init__(self, told):
        self.told = told

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.told()


def gradients(world, folder, beta: float, **values) -> tuple[torch.Tensor, Listed, torch.Tensor]:
    """TRL's gradient in the last step, the policy that it is of, and the samples that it was made from."""
    run, seen = Trained(world, folder, beta=beta, **values), {}

    def look():
        seen["gradient"] = torch.cat([p.grad.flatten() for p in run.trainer.model.parameters()]).double()
        seen["policy"], seen["samples"] = run.listed(), run.samples()

    run.trainer.add_callback(BeforeOptimizer(look))
    run.trainer.train()
    return seen["gradient"], seen["policy"], seen["samples"]


def gradient_of(policy: Listed, loss) -> torch.Tensor:
    loss(policy()).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# E10


@pytest.mark.parametrize("micro_batch_answers", [16, 4])
def test_a_step_of_trl_is_the_leave_one_out_gradient_of_its_own_samples(world, folder, micro_batch_answers):
    """In every weight, after three steps away from the reference: the sum of log-ratios is in the reward, unscaled."""
    found, policy, samples = gradients(
        world, folder, 0.7, samples=8, steps=4, learning_rate=0.02, micro_batch_answers=micro_batch_answers
    )
    assert samples.shape == (2, 8)
    loss = lambda logp: rloo_loss(logp, world.reference_XY, world.reward_XY, 0.7, samples)
    assert apart(found, gradient_of(policy, loss)) < 2e-5


@pytest.mark.parametrize("wrong", ["beta halved", "no reference", "mean over tokens"])
def test_the_gradient_tells_a_wrong_one(world, folder, wrong):
    """The bound above is no empty one."""
    found, policy, samples = gradients(world, folder, 0.7, samples=8, steps=4, learning_rate=0.02)
    tokens = torch.tensor([len(answer) for answer in world.rows[0].answers_ids])
    reference = {"no reference": torch.zeros_like(world.reference_XY)}.get(wrong, world.reference_XY)
    beta = {"beta halved": 0.35, "mean over tokens": 0.7 / tokens}.get(wrong, 0.7)
    loss = lambda logp: rloo_loss(logp, reference, world.reward_XY, beta, samples)
    assert apart(found, gradient_of(policy, loss)) > 1e-2


def test_many_samples_give_the_exact_gradient(world, folder):
    found, policy, _ = gradients(world, folder, 0.5, samples=2000, steps=2, learning_rate=0.02)
    exact = gradient_of(policy, lambda logp: minus_e1(logp, world.reference_XY, world.reward_XY, 0.5))
    assert torch.nn.functional.cosine_similarity(found, exact, dim=0) > 0.99 and apart(found, exact) < 0.15


@pytest.fixture(scope="module")
def ends(world, folder) -> dict[float, dict[str, float]]:
    """Where 150 steps lead, by β."""
    found = {}
    for beta in (0.5, 2.0):
        run = Trained(world, folder, beta=beta, samples=32, steps=150, learning_rate=0.02, max_grad_norm=1.0)
        run.trainer.train()
        with torch.no_grad():
            found[beta] = measures(run.listed()(), world, beta)
    return found


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_training_moves_to_the_optimum(world, ends, beta):
    start = measures(world.reference_XY, world, beta)
    assert ends[beta]["total_variation"] < start["total_variation"] / 5
    assert start["e1"] < ends[beta]["e1"] <= ends[beta]["e1_best"] + 1e-6


def test_a_stronger_beta_stays_nearer_to_the_reference(ends):
    assert 0 < 3 * ends[2.0]["kl_to_reference"] < ends[0.5]["kl_to_reference"]
    assert ends[2.0]["reward"] < ends[0.5]["reward"]


def test_what_is_recorded_is_of_the_steps_own_samples(world, folder):
    """Reward, KL an answer and E1 as means over the answers drawn; before the first step the KL is zero."""
    run = Trained(world, folder, beta=0.5, samples=16, steps=1)
    policy = run.listed()
    run.trainer.train()
    (point,) = run.points
    picked = run.samples()
    assert point["reward"] == pytest.approx(world.reward_XY.gather(1, picked).mean().item(), abs=1e-5)
    assert point["kl"] == 0 and point["objective_e1"] == point["reward"]
    with torch.no_grad():
        assert torch.allclose(policy(), world.reference_XY, atol=1e-6)
    run = Trained(world, folder, beta=0.5, samples=64, steps=3, learning_rate=0.05)
    before = []
    run.trainer.add_callback(BeforeOptimizer(lambda: before.append(run.listed())))
    run.trainer.train()
    with torch.no_grad():
        ratio = (before[-1]() - world.reference_XY).gather(1, run.samples())
    assert run.points[-1]["kl"] == pytest.approx(ratio.mean().item(), rel=1e-4) and ratio.mean() > 1e-3


# The reference


def test_the_reference_is_the_sft_folder(world, folder):
    trainer = Trained(world, folder).trainer
    expected = load_causal_lm(folder).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in trainer.ref_model.state_dict().items())
    assert not any(
        parameter.requires_grad and parameter.grad is not None for parameter in trainer.ref_model.parameters()
    )


def test_another_reference_is_refused(world, folder, tmp_path, monkeypatch):
    other, load = tmp_path / "other", load_causal_lm
    save_model(copy.deepcopy(make(seed=2, letters=2).model).float(), letters(), other)
    folders = iter([other, folder])
    monkeypatch.setattr(rloo, "load_causal_lm", lambda _: load(next(folders)))
    with pytest.raises(UserError, match=r"loaded another reference than this folder \(.*other\)"):
        Trained(world, folder)


# Tokens and rewards


def test_prompts_reach_the_model_as_the_renderers_tokens(world, folder):
    trainer = Trained(world, folder).trainer
    for made, prompts in (
        (byte_tokenizer(bos=True), [text_prompt("The film"), text_prompt("Why"), text_prompt("")]),
        (byte_tokenizer(template=CHATML), [chat(("user", "Why?")), chat(("system", "Be brief."), ("user", "Why?"))]),
    ):
        renderer, trainer.processing_class = Renderer(made), made
        kept = [tuple(renderer.prompt_ids(prompt)) for prompt in prompts]
        given = rloo.as_given([Row(id="r", prompt=prompt) for prompt in prompts], kept, made)
        assert [tuple(ids) for ids in trainer._tokenize_prompts(given)[0]] == kept
        assert [rloo.tokens_of(one, made) for one in given] == kept


def test_a_cut_prompt_is_given_as_the_text_of_its_end():
    made = byte_tokenizer(bos=True)
    row = Row(id="r", prompt=text_prompt("The film opens"), answers=())
    kept = Renderer(made, max_prompt_tokens=6).render(row, ()).prompt_ids
    assert rloo.as_given([row], [kept], made) == ["opens"] and rloo.tokens_of("opens", made) == kept


def test_texts_and_chats_in_one_table_are_refused():
    made = byte_tokenizer(template=CHATML)
    rows = [Row(id="a", prompt=text_prompt("Why?")), Row(id="b", prompt=chat(("user", "Why?")))]
    with pytest.raises(UserError, match="one kind at a time"):
        rloo.as_given(rows, [tuple(Renderer(made).prompt_ids(row.prompt)) for row in rows], made)


@pytest.fixture
def project(tmp_path_factory, tmp_path) -> tiny.Project:
    return tiny.finished(tmp_path_factory.getbasetemp()).copy(tmp_path / "copy")


def test_the_reward_is_the_score_of_stage_verdicts(project):
    """Of the same tokens; the last digits depend on what is scored beside them."""
    root = project.root
    rows = read_rows(root / "data/rollouts.parquet")
    said = read_verdicts(root / "data/verdicts.parquet")
    made = load_tokenizer(root / "models/sft")
    judge = make_judge(JudgeParams(), trained=root / "models/reward_model", source=root / "data/source", where="here")
    kept = [Renderer(made).prompt_ids(row.prompt) for row in rows]
    asked = [(n, k) for n, row in enumerate(rows) for k in range(len(row.answers))]
    score = rewards(judge, rows, kept, made)
    found = score([n for n, _ in asked], [rows[n].answers[k].token_ids for n, k in asked])
    known = {(row_id, one.shown): one.values[0] for row_id, mine in said.items() for one in mine}
    expected = [known[rows[n].id, (k,)] for n, k in asked]
    assert len(asked) == 24 * 4 and found == pytest.approx(expected, abs=1e-5)
    assert {answer.finish_reason for row in rows for answer in row.answers} == {"stop", "length"}


# The stage


def test_the_stage_trains_and_says_how(project):
    told = project.run("policy_gradient")
    assert told.status == 0, told.err
    metrics = project.metrics("policy_gradient")
    assert metrics["start_kl"] == 0 and metrics["beta"] == Params().beta
    assert (metrics["rows"], metrics["prompts_seen"], metrics["samples"]) == (24, 3 * 4, 3 * 4 * 4)
    assert metrics["kl"] != 0 and metrics["tokens"] > 0
    policy, sft = project.root / "models/policy-rlhf", project.root / "models/sft"
    assert sorted(path.name for path in policy.iterdir()) == sorted(path.name for path in sft.iterdir())
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (policy / name).read_bytes() == (sft / name).read_bytes()
    mine, theirs = (load_causal_lm(path).state_dict() for path in (policy, sft))
    assert any(not torch.equal(mine[name], theirs[name]) for name in theirs)
    assert "Warning" not in told.err and "{'loss'" not in told.out
    assert (project.root / "reports/policy_gradient/plots/curves.png").exists()
    before = project.tree()
    assert project.run("policy_gradient").status == 0 and project.tree() == before  # the same seed, the same bytes


def test_a_run_that_was_stopped_leaves_the_old_policy(project):
    before = project.tree("models")
    stop = tiny.killed_at("tasks.rloo:_Tell.on_log", 2, by=signal.SIGTERM)
    assert project.run("policy_gradient", before=stop).status == 143
    assert project.tree("models") == before


MISTAKES = {  # params, words of the message
    "a pairwise judge": (
        {"judge": vars(JudgeParams()) | {"kind": "local_llm"}},
        ("kind is 'local_llm'", "reward_model"),
    ),
    "replies in a file": ({"judge": vars(JudgeParams()) | {"kind": "stored"}}, ("kind is 'stored'", "reward_model")),
    "one sample": ({"samples": 1}, ("policy_gradient.samples: must be at least 2",)),
    "too few prompts": ({"prompts_per_step": 48, "micro_batch_answers": 192}, ("rollout.parquet: 24 prompts", "is 48")),
    "uneven parts": ({"micro_batch_answers": 5}, ("micro_batch_answers is 5", "a step has 16 answers")),
    "no room": ({"max_new_tokens": 190}, ("max_new_tokens = 190", "192 positions")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told(project, mistake):
    params, words = MISTAKES[mistake]
    project.change({"policy_gradient": params})
    before = project.tree("models")
    error = project.run("policy_gradient").error
    assert all(word in error for word in words) and project.tree("models") == before, error


def test_no_prompts(project):
    write_rows(project.root / "data/prompts/rollout.parquet", [])
    assert "rollout.parquet: 0 prompts" in project.run("policy_gradient").error


def test_without_trl_the_extra_is_named(project):
    error = project.run("policy_gradient", before=tiny.without("trl")).error
    assert "TRL, which is not installed" in error and "'.[rlhf]'" in error


def test_other_tokens_are_refused(project):
    """A tokenizer that closes texts: TRL would give the model a prompt that has ended."""
    made = load_tokenizer(project.root / "models/sft")
    closes = copy.deepcopy(made)
    assert rloo.tokens_of("The film", made) == tuple(Renderer(made).prompt_ids(text_prompt("The film")))
    from tokenizers import processors

    closes.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {made.eos_token}", special_tokens=[(made.eos_token, made.eos_token_id)]
    )
    closes.save_pretrained(project.root / "models/sft")
    assert "as other tokens than in the other stages" in project.run("policy_gradient").error


# A reward from rankings


def test_a_reward_model_learns_whole_rankings_from_the_table_of_preferences(project):
    """K = 4, by how often an answer says superb; three in four rows train, the others are held out."""
    answers = [f"a {' '.join(['superb'] * (3 - k) + ['awful'] * k)} film" for k in range(4)]
    rows = [
        Row(
            id=f"r{n:02}",
            prompt=text_prompt(f"Review {n}: "),
            answers=tuple(Answer(text=answers[(k + n) % 4], rank=(k + n) % 4) for k in range(4)),
            meta={"split": "held_out" if n % 4 == 0 else "train"},
        )
        for n in range(48)
    ]
    write_rows(project.root / "data/preferences.parquet", rows)
    (project.root / "data/prompts/labelled_test.parquet").unlink()
    before = project.tree("models")
    project.change({"reward_model": {"epochs": 6}})
    told = project.run(
        "reward_model",
        "--labelled",
        "data/preferences.parquet",
        "--model",
        "models/ranked",
        "--report",
        "reports/ranked",
    )
    assert told.status == 0, told.err
    metrics = project.metrics("ranked")
    assert (metrics["rows"], metrics["test_rows"]) == (36, 12) and metrics["test_accuracy"]["mean"] > 0.9
    assert {path: digest for path, digest in project.tree("models").items() if "ranked" not in path} == before
