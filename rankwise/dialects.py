"""What each kind of server takes, lacks and gives: the one place that knows.

Whatever a server would leave out in silence, or take in another meaning than rankwise.sampling gives it, is a lack.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rankwise.sampling import Sampling
from rankwise.types import UserError


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """What one kind of server takes and gives."""

    options: Callable[[Sampling], dict[str, Any]]
    lacks: dict[tuple[str, ...], str]  # settings that cannot be had (together), and why
    takes_ids: bool | None  # None: to be tried
    gives: dict[str, Any]  # asks for token ids and log-probs
    n_is_seeds: bool = False  # choice k of n is drawn with seed + k
    one_at_a_time: bool = False  # else seeds mean nothing
    warning: str = ""  # what a user should know of every run

    def check(self, sampling: Sampling, url: str) -> None:
        """Raises UserError where the server lacks a setting that is not at rest."""
        rest = Sampling(max_new_tokens=sampling.max_new_tokens)
        for names, why in self.lacks.items():
            if all(getattr(sampling, name) != getattr(rest, name) for name in names):
                settings = " with ".join(f"{name} = {getattr(sampling, name)}" for name in names)
                raise UserError(f"{settings} cannot be had from the server at {url}: {why}")


def _extended(sampling: Sampling) -> dict[str, Any]:
    # All of them, at rest too: left out, vLLM takes those of the model's generation_config.json.
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
    }


def _generation_config(sampling: Sampling) -> dict[str, Any]:
    config = {
        "do_sample": sampling.temperature > 0,
        "temperature": sampling.temperature or 1.0,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
    }
    return {"generation_config": json.dumps(config), **_stop(sampling)}


def _plain(sampling: Sampling) -> dict[str, Any]:
    return {"temperature": sampling.temperature, "top_p": sampling.top_p, **_stop(sampling)}


def _stop(sampling: Sampling) -> dict[str, Any]:
    return {"stop": list(sampling.stop)} if sampling.stop else {}


DIALECTS = {
    "vllm": Dialect(
        options=_extended,
        lacks={("min_p", "top_p"): "vLLM applies min_p before top_p, and other tokens are left then; use one of them"},
        takes_ids=True,
        gives={"return_token_ids": True, "logprobs": 0},
        n_is_seeds=True,
    ),
    # After its documentation. Its log-probs are those after temperature, so they are not asked for.
    "sglang": Dialect(
        options=_extended,
        lacks={
            ("top_k", "top_p"): "SGLang applies both to the whole distribution, not one after the other; use one",
            ("repetition_penalty",): "SGLang does not say that the prompt's tokens count",
        },
        takes_ids=True,
        gives={"return_token_ids": True},
    ),
    "transformers": Dialect(
        options=_generation_config,
        lacks={("stop_token_ids",): "transformers serve would end answers with these in place of the model's own"},
        takes_ids=False,
        gives={},
        one_at_a_time=True,  # its seed is that of the whole process
    ),
    "plain": Dialect(
        options=_plain,
        lacks={
            (name,): "the OpenAI API has no such field; use vLLM, transformers serve or the embedded engine"
            for name in ("top_k", "min_p", "repetition_penalty", "stop_token_ids")
        },
        takes_ids=None,
        gives={},
        # Sent in no field, an option cannot be put to rest either.
        warning=(
            "top_k, min_p and penalties are not sent, as the OpenAI API has no such fields: the server's own defaults "
            "apply and cannot be seen (llama.cpp and Ollama have a top_k of 40). Start it without them, or use vLLM, "
            "transformers serve or the embedded engine"
        ),
    ),
}
