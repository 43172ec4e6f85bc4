"""The whole path from token rows to gradients against textbooks in float64: exact to the last digits of a double.

test_scoring compares layouts in float32, where a small error of principle could hide in the rounding; here it could
not: agreement is asked to 1e-12. What float32 and bf16 then lose is bounded by what the naive code loses.

Letters: A answers, B prompts, K answers a prompt.
"""

import dataclasses

import pytest
import torch
from test_scoring import SHARING, tiny, token_rows
from torch.overrides import TorchFunctionMode

from rankwise.checkpoints import numerics
from rankwise.learners import PreferenceLearner, PreferenceSettings
from rankwise.rendering import TokenRow
from rankwise.scoring import LogpModel
from rankwise.training import Settings, train

EXACT = 1e-12  # relative; a double has 1e-16, and some thousand are added up
BETA = 0.3
SLACK = 1.25  # found: 0.89 to 1.19
MIXED = token_rows(8, answers=(2, 4), longest=9, prompt=8)  # pairs and rankings of four, every length its own
WINDOW = 5
NARROW = {  # windows shorter than most paths
    "mistral-window": {"sliding_window": WINDOW},
    "gemma2-softcap": {"sliding_window": WINDOW},
    "gemma3": {"sliding_window": WINDOW, "num_hidden_layers": 6},  # five local layers, then a global one
    "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
}
CASES = [(name, {}) for name in SHARING] + list(NARROW.items())
GROUPED = [("llama", {"num_key_value_heads": heads}) for heads in (1, 2, 4)]  # 4 query heads over each


class Doubles(TorchFunctionMode):
    """float32 where code names it (norms, rotary tables, softmax of the library's models) becomes float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wide = lambda value: torch.float64 if value is torch.float32 else value
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


@pytest.fixture
def doubles():
    with Doubles():
        yield


def one_by_one(model: torch.nn.Module, rows: list[TokenRow]) -> torch.Tensor:
    """The textbook, [A]: one unpadded sequence at a time, all logits in the model's own type, log-softmax, sum."""
    sums = []
    for row in rows:
        for answer in row.answers_ids:
            whole = torch.tensor([[*row.prompt_ids, *answer]])
            logits = model(input_ids=whole, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1]
            logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            sums.append(logps.gather(1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(sums)


def plackett_luce_by_hand(logp_A: torch.Tensor, reference_A: torch.Tensor, rows: list[TokenRow]) -> torch.Tensor:
    """E6 as it is written: Σ over places of log Σ exp over those not yet placed, minus the placed one's; mean."""
    losses, start = [], 0
    for row in rows:
        end = start + len(row.answers_ids)
        s = BETA * (logp_A[start:end] - reference_A[start:end])
        losses.append(sum(s[k:].logsumexp(0) - s[k] for k in range(len(s))))
        start = end
    return torch.stack(losses).mean()


def random_references(rows: list[TokenRow]) -> dict[str, list[float]]:
    """Numbers that float32 holds exactly, far enough from the policy's for the gradient not to be that of ties."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: (-10 * torch.rand(n, generator=generator)).tolist()
    return {row.id: draw(len(row.answers_ids)) for row in rows}


def flat(references: dict[str, list[float]], rows: list[TokenRow]) -> torch.Tensor:
    return torch.tensor([x for row in rows for x in references[row.id]], dtype=torch.float64)


def learner_of(model: torch.nn.Module, rows: list[TokenRow], **named) -> PreferenceLearner:
    return PreferenceLearner(LogpModel(model, **named), 0, random_references(rows), PreferenceSettings(beta=BETA))


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """All weights' gradients as one vector of doubles, zero where there is none."""
    model.zero_grad()
    loss.backward()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in model.parameters()]
    )


def ours(
    model: torch.nn.Module, rows: list[TokenRow], *, precision="fp32", **named
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities with the mean loss behind them, and its gradient, by the way that training takes."""
    learner = learner_of(model, rows, **named)
    batch = learner.collate(rows)
    with numerics(precision, torch.device("cpu")):
        output = learner.module(batch)
        loss = learner.losses(output, batch).loss_B.mean()
        return torch.cat([output.sum_A, loss[None]]).detach().double(), gradient(model, loss)


def naive(model: torch.nn.Module, rows: list[TokenRow], *, precision="fp32") -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the textbooks."""
    with numerics(precision, torch.device("cpu")):
        logp_A = one_by_one(model, rows)
        loss = plackett_luce_by_hand(logp_A, flat(random_references(rows), rows), rows)
        return torch.cat([logp_A, loss[None]]).detach().double(), gradient(model, loss)


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance from b."""
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name, changes", CASES + GROUPED, ids=str)
def test_loss_and_gradients_are_those_of_the_textbook_in_float64(name, changes, doubles):
    """Grouped queries, windows, caps, scales, tied heads, K of 2 and 4 in one batch: exact, whatever the layout."""
    model = tiny(name, **changes).double()
    for found, expected in zip(ours(model, MIXED), naive(model, MIXED)):
        assert far(found, expected) <= EXACT


@pytest.mark.parametrize("name", NARROW)
def test_the_windows_above_do_hide_something(name):
    near, wide = (tiny(name, **{**NARROW[name], "sliding_window": w}).double() for w in (WINDOW, 128))
    assert far(one_by_one(near, MIXED), one_by_one(wide, MIXED)) > 1e-3


@pytest.mark.parametrize("layout", ["auto", "shared", "padded"])
def test_the_gradient_is_the_closed_form_through_the_whole_model(layout, doubles):
    """∇L = β/B Σ_k c_k ∇ log π(y_k), c_k = −1 + Σ_{j ≤ k} exp(s_k) / Σ_{m ≥ j} exp(s_m); K = 2 gives ∓σ(s_2 − s_1)."""
    model = tiny().double()
    references = random_references(MIXED)
    expected = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for row in MIXED:
        logps = one_by_one(model, [row])
        s = BETA * (logps.detach() - flat(references, [row]))
        shares = [torch.cat([torch.zeros(j, dtype=s.dtype), s[j:].softmax(0)]) for j in range(len(s))]
        c = torch.stack(shares).sum(0) - 1
        if len(s) == 2:
            torch.testing.assert_close(c, torch.sigmoid(s[1] - s[0]) * torch.tensor([-1.0, 1.0]).double())
        expected += gradient(model, (BETA * c * logps).sum() / len(MIXED))
    assert far(ours(model, MIXED, layout=layout)[1], expected) <= EXACT


@pytest.fixture
def applied(monkeypatch):
    """The gradients that each optimizer step was given."""
    seen, step = [], torch.optim.AdamW.step

    def spy(self, *arguments, **named):
        weights = [p for group in self.param_groups for p in group["params"]]
        seen.append({id(p): p.grad.detach().clone() for p in weights})
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    return seen


@pytest.mark.parametrize(
    "budget", [1, 30, 45, 100, 10_000], ids=["1 × 8", "uneven", "uneven again", "few parts", "8 × 1"]
)
def test_every_row_weighs_one_in_b_however_the_step_is_cut(budget, applied, doubles):
    """The step's gradient is the plain mean of the rows' own gradients, each taken alone; the last step has 3 rows."""
    rows = MIXED + [dataclasses.replace(row, id=f"more-{row.id}") for row in token_rows(3, seed=5)]
    model = tiny().double()
    learner = learner_of(model, rows)
    own = {row.id: gradient(model, _loss_alone(learner, row)) for row in rows}
    model.zero_grad(set_to_none=True)
    settings = Settings(
        learning_rate=0.0, epochs=1, batch_size=8, micro_batch_tokens=budget, max_grad_norm=0.0, weight_decay=0.0
    )
    seen_rows = _rows_by_step(rows, settings)
    train(learner, rows, settings, what="test")
    assert [len(members) for members in seen_rows] == [8, 3] and len(applied) == 2
    for members, grads in zip(seen_rows, applied):
        got = torch.cat([grads[id(p)].flatten() for p in model.parameters()])
        assert far(got, torch.stack([own[row.id] for row in members]).mean(0)) <= EXACT


def _loss_alone(learner: PreferenceLearner, row: TokenRow) -> torch.Tensor:
    batch = learner.collate([row])
    return learner.losses(learner.module(batch), batch).loss_B.sum()


def _rows_by_step(rows: list[TokenRow], settings: Settings) -> list[list[TokenRow]]:
    from rankwise.batching import steps

    cut = steps(len(rows), batch_size=settings.batch_size, epochs=settings.epochs, seed=settings.seed)
    return [[rows[i] for i in indices] for indices in cut]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gemma2-softcap", "mistral-window", "gpt2"])
def test_what_a_precision_costs_is_within_the_naive_codes_error(name, precision):
    """Against float64, root mean square over eight batches: no worse than full logits, one sequence at a time.

    Two right orders of summation differ by luck; hence SLACK, which a wrong accumulator would exceed at once.
    """
    squares = {"ours": torch.zeros(2), "naive": torch.zeros(2)}
    for seed in range(8):
        rows = token_rows(6, answers=(2, 4), longest=9, prompt=8, seed=seed)
        with Doubles():
            exact = naive(tiny(name, seed=seed).double(), rows)
        for who, way in {"ours": ours, "naive": naive}.items():
            found = way(tiny(name, seed=seed), rows, precision=precision)
            squares[who] += torch.tensor([far(a, b) ** 2 for a, b in zip(found, exact)])
    assert (squares["ours"].sqrt() <= SLACK * squares["naive"].sqrt()).all(), squares
