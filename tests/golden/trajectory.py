"""Fifty steps of preference training, kept as numbers: `python -m tests.golden.trajectory` runs and rewrites them.

A change of the code that leaves the trajectory where it was leaves the mathematics where it was. The model and its
rows are made by numpy's generator, whose numbers are the same on every machine (torch's normal_ differs with the
vector instructions at hand).

The file also says how far rounding alone moves each number: the same fifty steps in float64 are run beside, and their
distance to the ones in float32 is what another order of sums, another library or another CPU may cost.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankwise.learners import PreferenceLearner, PreferenceSettings
from rankwise.rendering import TokenRow
from rankwise.rows import write_json
from rankwise.scoring import LogpModel
from rankwise.training import Hooks, Settings, train

FILE = Path(__file__).with_suffix(".json")
STEPS, BATCH, ROWS = 50, 8, 40
NAMES = ("loss", "grad_norm", "margin")
VOCABULARY = 64


def rows() -> list[TokenRow]:
    """Prompts of 2 to 9 tokens with 2 to 4 answers of 1 to 12, best first."""
    rng = np.random.default_rng(7)
    draw = lambda low, high: tuple(rng.integers(3, VOCABULARY, rng.integers(low, high + 1)).tolist())
    made = []
    for i in range(ROWS):
        answers = tuple((*draw(0, 11), 2) for _ in range(2 + i % 3))
        made.append(
            TokenRow(
                id=f"row-{i:02}", prompt_ids=(1, *draw(1, 8)), answers_ids=answers, ranks=tuple(range(len(answers)))
            )
        )
    return made


def model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama of 2 layers whose weights are wide enough for every part of it to matter."""
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    rng = np.random.default_rng(11)
    with torch.no_grad():
        for _, p in sorted(made.named_parameters()):
            p.copy_(torch.from_numpy(0.2 * rng.standard_normal(p.shape) + (p.dim() == 1)))
    return made.to(dtype).eval()


@torch.no_grad()
def references(table: list[TokenRow]) -> dict[str, list[float]]:
    """The untrained model's log-probabilities, one sequence at a time in float64, then rounded to float32."""
    frozen, found = model(torch.float64), {}
    for row in table:
        logps = []
        for answer in row.answers_ids:
            whole = torch.tensor([[*row.prompt_ids, *answer]])
            logits = frozen(input_ids=whole, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1]
            logps.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().float().item())
        found[row.id] = logps
    return found


def run(*, micro_batch_tokens: int = 10_000, dtype: torch.dtype = torch.float32, layout: str = "auto") -> dict:
    """The fifty steps: a list of 50 for each of NAMES, and sums over the weights at the end."""
    table = rows()
    module = LogpModel(model(dtype), layout=layout)
    before = torch.cat([p.detach().flatten().double() for p in module.parameters()])
    learner = PreferenceLearner(module, 0, references(table), PreferenceSettings(beta=0.2))
    settings = Settings(
        learning_rate=1e-3,
        epochs=STEPS * BATCH // ROWS,
        batch_size=BATCH,
        micro_batch_tokens=micro_batch_tokens,
        weight_decay=0.01,
    )
    records: list[dict[str, float]] = []
    hooks = Hooks(on_step=lambda record: records.append(record.values))
    train(learner, table, settings, what="golden", hooks=hooks)
    after = torch.cat([p.detach().flatten().double() for p in module.parameters()])
    weights = {"sum": after.sum(), "norm": after.norm(), "moved": (after - before).norm()}
    found = {name: [record[name] for record in records] for name in NAMES}
    return found | {"weights": [value.item() for value in weights.values()]}


def largest_change(found: dict, kept: dict) -> dict[str, float]:
    """The largest absolute difference of each list."""
    return {name: max(abs(a - b) for a, b in zip(found[name], kept[name], strict=True)) for name in found}


def main() -> None:
    found = run()
    if FILE.exists():
        kept = json.loads(FILE.read_text())
        changes = largest_change(found, {name: kept[name] for name in found})
        for name, change in changes.items():
            print(f"{name}: changed by at most {change:.2e}; rounding was {kept['rounding'][name]:.2e}")
    write_json(FILE, found | {"rounding": largest_change(found, run(dtype=torch.float64))})
    print(f"{FILE}: written")


if __name__ == "__main__":
    main()
