"""log π(y|x) of every answer of a batch, by a causal LM: the one function for SFT, the reference, training,
evaluation and the local judge, so that a number computed by one stage equals the same number in another.

Hidden states are gathered at answer-predicting positions only; rankwise.logprobs does the rest.

Letters: R rows of the tensor, L positions, N answer tokens, A answers, H hidden size.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.attention import NAME as TREE_ATTENTION
from rankwise.attention import register
from rankwise.batching import PROMPT, Batch, flat_rows, padded_rows, shared_rows
from rankwise.checkpoints import device
from rankwise.logprobs import token_logps
from rankwise.rendering import TokenRow
from rankwise.types import UserError

log = logging.getLogger(__name__)

# How rows lie in a tensor, the cheapest first.
LAYOUTS = {"flat": flat_rows, "shared": shared_rows, "padded": padded_rows}


@dataclass(frozen=True, kw_only=True)
class AnswerLogps:
    """Log-probabilities of a batch's answers, [A], in the order of Batch.answer_rows."""

    sum_A: Tensor  # Σ log π(token), nats, float32; the end-of-sequence token included
    tokens_A: Tensor  # number of tokens summed, int64


class LogpModel(nn.Module):
    """A causal LM as a function from a batch of token rows to the log-probabilities of their answers.

    layout "flat" computes a prompt once and its K answers beside it, without padding, by rankwise.attention (on a CPU);
    "shared" the same in rows under a dense tree mask; "padded" every answer in a row of its own. Left at "auto", the
    model itself decides: a small batch is scored in each, and the first layout that this process's device has is taken
    whose numbers are those of the model's own logits; the log says where it is the padded one.

    Raises UserError at "auto" where none is.
    """

    def __init__(self, model: PreTrainedModel, *, layout: str = "auto"):
        super().__init__()
        self.model = model
        self.layout = _layout_of(model) if layout == "auto" else layout
        if self.layout == "flat":
            _attend_to_trees(_plain(model))
        if self.layout == "padded" and layout == "auto":
            log.warning(
                "%s cannot share a prompt among its answers; rows are padded instead", type(_plain(model)).__name__
            )

    def batch(self, rows: list[TokenRow], pad_id: int) -> Batch:
        """Lay rows out the way that this model can take; raises UserError for rows that it must not see together."""
        _check_rotary_tables(_plain(self.model), rows)
        within = _within_window(_plain(self.model), rows)
        return LAYOUTS[self.layout if within else "padded"](rows, pad_id)

    def cost(self, rows: list[TokenRow]) -> float:
        """Positions that a forward pass over rows computes: as batch lays them out, padding to the longest included.

        Infinite where the model would take another rotary table for some rows than it takes for them alone.
        """
        if len(_rotary_tables(_plain(self.model), rows)) > 1:
            return math.inf
        if self.layout != "padded" and _within_window(_plain(self.model), rows):
            return sum(row.positions for row in rows)
        return sum(len(row.answers_ids) for row in rows) * max(row.longest_path for row in rows)

    def forward(self, batch: Batch) -> AnswerLogps:
        """Log-probabilities of a batch's answers; under autocast hidden states may be bf16, sums are float32."""
        plain = _plain(self.model)
        if batch.trees and plain.config._attn_implementation != TREE_ATTENTION:
            raise UserError(
                f"{type(plain).__name__}: its attention was set to {plain.config._attn_implementation!r} after "
                "LogpModel chose flat rows, which that attention cannot tell apart; make a new LogpModel of it"
            )
        hidden_RLH = _backbone(plain)(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=_mask(plain, batch),
            use_cache=False,
            **({"trees": batch.trees} if batch.trees else {}),
        ).last_hidden_state
        # index_select, not [...]: its backward adds in a fixed order where K answers share the prompt's last state.
        hidden_NH = hidden_RLH.flatten(0, 1).index_select(0, batch.source_index)
        head = plain.get_output_embeddings()
        softcap = getattr(plain.config, "final_logit_softcapping", None) or 0.0
        scale = _head_scale(plain)
        logp_N = token_logps(
            hidden_NH * scale if scale != 1 else hidden_NH, head.weight, head.bias, batch.target_ids, softcap=softcap
        )
        sum_A = torch.zeros(len(batch.answer_rows), dtype=logp_N.dtype, device=logp_N.device)
        return AnswerLogps(sum_A=sum_A.index_add(0, batch.answer_index, logp_N), tokens_A=batch.answer_tokens)


def _plain(model: nn.Module) -> PreTrainedModel:
    # peft puts its adapters inside the base model's own modules, so the base model carries them.
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _backbone(model: PreTrainedModel) -> nn.Module:
    # Llama 4's prefix names a part that its text model does not have.
    return getattr(model, model.base_model_prefix, None) or model.get_decoder()


def _head_scale(model: PreTrainedModel) -> float:
    # Granite divides its logits, Cohere multiplies them; a factor on the hidden states is the same thing.
    config = model.config
    if getattr(config, "logits_scaling", None):
        return 1 / config.logits_scaling
    return getattr(config, "logit_scale", None) or 1.0


def _mask(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The batch's mask as the model's attention takes it: eager attention adds it to the scores."""
    if batch.trees:  # any 4-D mask goes through the model as it is, and attention over trees reads none
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    mask = batch.attention_mask()
    if batch.is_tree and model.config._attn_implementation == "eager":
        return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(model.dtype).min
        )
    return mask


def _within_window(model: PreTrainedModel, rows: list[TokenRow]) -> bool:
    """Whether every answer sees its whole past; where a local window hides some, the model's own mask is needed."""
    config = model.config
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if getattr(config, "use_sliding_window", True) is not False and window:
        return max(row.longest_path for row in rows) <= window
    # GPT-Neo counts its window in places of the tensor row, whatever the position ids say; Doge keeps so many keys.
    places = getattr(config, "window_size", None) or getattr(config, "keep_window_size", None)
    return not places or max(row.positions for row in rows) <= places


def _attend_to_trees(model: PreTrainedModel) -> None:
    register()
    model.config._attn_implementation = TREE_ATTENTION


def rotary_limits(model: PreTrainedModel) -> list[tuple[str, int]]:
    """(type, positions) of each rotary table that the library chooses by the longest row of a batch."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    tables = [rope] if "rope_type" in rope else [table for table in rope.values() if isinstance(table, dict)]
    default = getattr(model.config, "max_position_embeddings", 0)
    return [
        (table["rope_type"], table.get("original_max_position_embeddings") or default)
        for table in tables
        if table.get("rope_type") in ("longrope", "dynamic")
    ]


def _rotary_tables(model: PreTrainedModel, rows: list[TokenRow]) -> set[tuple[bool, ...]]:
    limits = rotary_limits(model)
    return {tuple(row.longest_path > limit for _, limit in limits) for row in rows}


def _check_rotary_tables(model: PreTrainedModel, rows: list[TokenRow]) -> None:
    if not (limits := rotary_limits(model)):
        return
    if len(_rotary_tables(model, rows)) > 1:
        raise UserError(
            f"{type(model).__name__}: rows on both sides of {limits[0][1]} positions in one batch; its rotary table "
            f"({limits[0][0]}) follows the longest, so numbers of the short ones would be wrong; cut batches by "
            "micro_batches(..., cost=LogpModel.cost)"
        )
    for kind, limit in limits:
        if kind == "dynamic" and (long := [row.id for row in rows if row.longest_path > limit]):
            raise UserError(
                f"{type(model).__name__}: rows longer than {limit} positions: {', '.join(long[:10])} ({len(long)} in "
                "all); its dynamic rotary table would make their numbers depend on what was computed before; limit "
                "max_prompt_tokens and max_answer_tokens, or give the model another rope_type (yarn)"
            )


@torch.no_grad()
def _layout_of(model: PreTrainedModel) -> str:
    """The first layout that gives the log-probabilities of the model's own logits; raises UserError where none does."""
    plain = _plain(model)
    rows = _probe_rows(plain.config.get_text_config().vocab_size)
    was_training = model.training
    model.eval()
    refused = ""
    try:
        alone = [_one_by_one(plain, row.prompt_ids, answer) for row in rows for answer in row.answers_ids]
        if not torch.stack(alone).isfinite().all():
            raise UserError(
                f"{plain.name_or_path or type(plain).__name__}: its log-probabilities are no finite numbers, so its "
                "weights are spoilt; train it again (a lower learning rate, precision fp32), or take another model"
            )
        for layout in LAYOUTS:
            if layout == "flat" and not _takes_trees(plain):
                continue
            try:
                if _agrees(model, rows, layout, torch.stack(alone).float()):
                    return layout
            except Exception as error:
                # Any refusal of a mask, of trees or of position ids means the same: it cannot take the layout.
                log.info("layout %s refused: %s", layout, error)
                refused = f" (it said: {error})"
    finally:
        model.train(was_training)
    raise UserError(
        f"{type(plain).__name__}: log-probabilities computed from its last hidden states differ from those of "
        f"its own logits{refused} (a scaled head, or attention that is not causal), so training on them would be wrong "
        "in silence; use a causal LM whose logits are its output embedding applied to its last hidden states"
    )


def _takes_trees(model: PreTrainedModel) -> bool:
    return device().type == "cpu" and model.config._attn_implementation in ("sdpa", TREE_ATTENTION)


def _agrees(model: PreTrainedModel, rows: list[TokenRow], layout: str, alone_A: Tensor) -> bool:
    """Whether a layout gives the numbers of one answer at a time through the model's own logits."""
    config, weight = _plain(model).config, next(model.parameters())
    before = config._attn_implementation
    try:
        module = LogpModel(model, layout=layout)
        batch = LAYOUTS[layout](rows, 0).to(weight.device)
        per_token = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2
        near = torch.allclose(module(batch).sum_A.float(), alone_A, rtol=0, atol=per_token * 6)
        return near and not _leaks(module, batch)
    finally:
        config._attn_implementation = before


def _leaks(module: LogpModel, batch: Batch) -> bool:
    """Whether an answer's number depends on the words of another one.

    Recurrent and convolution layers mix neighbours; before training so little that sums cannot tell. A gradient can: it
    is exactly zero where there is no path.
    """
    embedded: list[Tensor] = []

    def note(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = _plain(module.model).get_input_embeddings().register_forward_hook(note)
    try:
        with torch.enable_grad():
            sum_A = module(batch).sum_A
            grads_ARLH = [torch.autograd.grad(one, embedded, retain_graph=True)[0] for one in sum_A]
    finally:
        handle.remove()
    own = lambda tree, slot: (batch.tree == tree) & ((batch.branch == slot) | (batch.branch == PROMPT))
    places = zip(batch.answer_rows.tolist(), batch.answer_slots.tolist())
    return any(grad_RLH[~own(tree, slot)].any() for grad_RLH, (tree, slot) in zip(grads_ARLH, places))


def _probe_rows(vocabulary: int) -> list[TokenRow]:
    ids = [(n * 7919 % max(vocabulary - 1, 1) + 1) % vocabulary for n in range(1, 24)]
    return [
        TokenRow(id="probe-1", prompt_ids=tuple(ids[:5]), answers_ids=(tuple(ids[5:9]), tuple(ids[9:15]))),
        TokenRow(id="probe-2", prompt_ids=tuple(ids[15:18]), answers_ids=(tuple(ids[18:20]), tuple(ids[20:23]))),
    ]


def _one_by_one(model: PreTrainedModel, prompt_ids: tuple[int, ...], answer_ids: tuple[int, ...]) -> Tensor:
    whole = torch.tensor([[*prompt_ids, *answer_ids]], device=next(model.parameters()).device)
    logits = model(input_ids=whole, use_cache=False).logits[0].float()
    picked = logits[len(prompt_ids) - 1 : -1].log_softmax(-1)
    return picked.gather(1, whole[0, len(prompt_ids) :, None]).sum()
