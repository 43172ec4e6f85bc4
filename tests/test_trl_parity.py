"""One step on the same batch as TRL's DPOTrainer and as the paper's code: same tokens, same loss, same gradients."""

import json
import math

import pytest
import torch
from test_rendering import CHATML, chat, tokenizer
from test_scoring import tiny
from torch.nn import functional as F

from rankwise.learners import PreferenceLearner, PreferenceSettings
from rankwise.rendering import Renderer
from rankwise.rows import write_rows
from rankwise.scoring import LogpModel
from rankwise.types import Answer, Row, text_prompt
from tasks.export_preferences import export

BETA = 0.1
# No answer is merged into its prompt: there TRL gives up the prompt's end, and we keep it (test_rendering).
PAIRS = [
    ("The film opens with", " a superb chase.", " a yawn."),
    ("Two hours", " of joy, and not a minute too long", " lost."),
    ("Why", " not?", " indeed would anybody sit through this once, let alone twice"),
    ("A cast", "", " to forget."),
]
LOSS, GRADIENT = 1.4e-6, 2.3e-6  # what TRL and the paper's code differ by themselves, relative


STRENGTH = math.log(0.8 / 0.2) / 2  # of the better answer; the other's is minus that: right with probability 0.8


def two(better: str, worse: str) -> tuple[Answer, Answer]:
    return Answer(text=better, rank=0, strength=STRENGTH), Answer(text=worse, rank=1, strength=-STRENGTH)


def texts() -> tuple[list[Row], list[dict]]:
    rows = [Row(id=f"{i}", prompt=text_prompt(p), answers=two(w, b)) for i, (p, w, b) in enumerate(PAIRS)]
    return rows, [{"prompt": p, "chosen": w, "rejected": b} for p, w, b in PAIRS]


def chats() -> tuple[list[Row], list[dict]]:
    turn = lambda role, content: [{"role": role, "content": content}]
    rows = [Row(id=f"{i}", prompt=chat(("user", p)), answers=two(w, b)) for i, (p, w, b) in enumerate(PAIRS)]
    records = [
        {"prompt": turn("user", p), "chosen": turn("assistant", w), "rejected": turn("assistant", b)}
        for p, w, b in PAIRS
    ]
    return rows, records


def flat(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def models(made):
    settings = {"vocab_size": len(made), "max_position_embeddings": 256, "num_hidden_layers": 2}
    return tiny(seed=1, **settings), tiny(seed=2, **settings)


def ours(rows, made, policy, reference, loss="plackett_luce"):
    """Loss, gradients and accuracy, the reference's numbers computed once and given."""
    rendered = [Renderer(made).render(row) for row in rows]
    module, frozen = LogpModel(policy), LogpModel(reference)
    with torch.no_grad():
        batch = frozen.batch(rendered, 0)
        known = {row.id: logps for row, logps in zip(rendered, batch.by_prompt(frozen(batch).sum_A).tolist())}
    learner = PreferenceLearner(module, 0, known, PreferenceSettings(beta=BETA, loss=loss))
    batch = learner.collate(rendered)
    result = learner.losses(module(batch), batch)
    policy.zero_grad()
    result.loss_B.mean().backward()
    return rendered, result.loss_B.mean().item(), flat(policy), result.stats["accuracy"].mean().item()


@pytest.fixture
def trainer(tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def make(records, made, policy, reference):
        config = DPOConfig(
            output_dir=str(tmp_path),
            beta=BETA,
            per_device_train_batch_size=len(records),
            max_length=None,
            use_cpu=True,
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
        )
        return DPOTrainer(
            policy, reference, args=config, train_dataset=Dataset.from_list(records), processing_class=made
        )

    return make


@pytest.mark.parametrize("form", [texts, chats])
def test_a_step_of_dpo_is_that_of_trl(form, trainer):
    rows, records = form()
    made = tokenizer(bos=True, template=CHATML if form is chats else None)
    policy, reference = models(made)
    rendered, loss, gradient, accuracy = ours(rows, made, policy, reference)
    theirs = trainer(records, made, policy, reference)
    for row, record in zip(rendered, theirs.train_dataset, strict=True):
        assert [list(row.prompt_ids), *map(list, row.answers_ids)] == [
            record[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        ]
    policy.train().zero_grad()
    value = theirs.compute_loss(policy, next(iter(theirs.get_train_dataloader())))
    value.backward()
    assert abs(loss - value.item()) <= LOSS * value.item()
    expected = flat(policy)
    assert (gradient - expected).norm() <= GRADIENT * expected.norm()
    assert abs(value.item() - 0.693147) > 1e-3  # policy and reference differ, so this is no empty case
    assert accuracy == pytest.approx(sum(theirs._metrics["train"]["rewards/accuracies"]))


@pytest.mark.parametrize("form", [texts, chats])
def test_soft_labels_are_a_step_of_trl_on_exported_labels_that_are_right_four_times_in_five(form, trainer, tmp_path):
    """p = 0.8: the mean of −log σ over each pair four times as exported and once the other way round."""
    rows, records = form()
    write_rows(tmp_path / "preferences.parquet", rows)
    export(tmp_path / "preferences.parquet", tmp_path / "pairs.jsonl", format="pairs", split="train")
    exported = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [{name: record[name] for name in ("prompt", "chosen", "rejected")} for record in exported] == records
    turned = [record | {"chosen": record["rejected"], "rejected": record["chosen"]} for record in exported]
    made = tokenizer(bos=True, template=CHATML if form is chats else None)
    policy, reference = models(made)
    _, loss, gradient, _ = ours(rows, made, policy, reference, loss="soft_plackett_luce")
    theirs = trainer([*exported * 4, *turned], made, policy, reference)
    policy.train().zero_grad()
    value = theirs.compute_loss(policy, next(iter(theirs.get_train_dataloader())))
    value.backward()
    assert abs(loss - value.item()) <= LOSS * value.item()
    assert (gradient - flat(policy)).norm() <= GRADIENT * flat(policy).norm()


def test_a_step_of_dpo_is_that_of_the_papers_code():
    """pi_logratios − ref_logratios through −log σ(β ·), over concatenated, right-padded rows, full logits."""
    rows, _ = texts()
    made = tokenizer(bos=True)
    policy, reference = models(made)
    rendered, loss, gradient, _ = ours(rows, made, policy, reference)

    def logps(model, answer: int) -> torch.Tensor:
        paths = [[*row.prompt_ids, *row.answers_ids[answer]] for row in rendered]
        width = max(map(len, paths))
        ids = torch.tensor([path + [0] * (width - len(path)) for path in paths])
        mask = torch.tensor([[1] * len(path) + [0] * (width - len(path)) for path in paths])
        spans = [range(len(row.prompt_ids), len(path)) for row, path in zip(rendered, paths)]
        labels = torch.tensor(
            [[t if i in span else -100 for i, t in enumerate(line)] for span, line in zip(spans, ids.tolist())]
        )[:, 1:]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        picked = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[:, :, None]).squeeze(2)
        return (picked * (labels != -100)).sum(-1)

    policy.zero_grad()
    with torch.no_grad():
        reference_ratio = logps(reference, 0) - logps(reference, 1)
    ratio = logps(policy, 0) - logps(policy, 1)
    value = -F.logsigmoid(BETA * (ratio - reference_ratio)).mean()
    value.backward()
    assert abs(loss - value.item()) <= LOSS * value.item()
    assert (gradient - flat(policy)).norm() <= GRADIENT * flat(policy).norm()


def test_policy_and_reference_alike_are_half_right_here_and_never_right_in_trl(trainer):
    """At step 0 every reward is equal: we count a tie as one half, TRL's strict > counts it as wrong."""
    rows, records = texts()
    made = tokenizer(bos=True)
    policy, _ = models(made)
    twin, _ = models(made)
    _, loss, _, accuracy = ours(rows, made, policy, twin)
    assert loss == pytest.approx(0.6931471805599453, abs=1e-6) and accuracy == 0.5
    theirs = trainer(records, made, policy.train(), twin)
    assert theirs.compute_loss(policy, next(iter(theirs.get_train_dataloader()))).item() == pytest.approx(loss)
    assert theirs._metrics["train"]["rewards/accuracies"] == [0.0]
