"""A registered policy, loaded from MLflow: prompts in, completions out.

    mlflow.pyfunc.load_model("models:/rankwise-policy@champion").predict(pd.DataFrame({"prompt": ["The film"]}))

MLflow calls _load_pyfunc with the folder of the version: the weights themselves, or pointer.json, which says where
the project made them and which md5 they have. tasks.weights finds them, from the project's root as the working folder;
elsewhere RANKWISE_POLICY names a folder that has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankwise import json_text
from rankwise.types import text_prompt
from tasks import weights


def find_weights(folder: Path) -> Path:
    """The policy's folder for a version; raises UserError where its weights are not to be had."""
    pointer = Path(folder) / "pointer.json"
    if not pointer.is_file():
        return Path(folder)
    mend = "register the policy again: dvc repro --force register"
    wanted = json_text.read(pointer, mend)
    with json_text.as_written(pointer, mend):
        revisions = weights.revisions_of(wanted.get("commit", ""), wanted.get("branch", ""))
        md5, path = str(wanted["md5"]), Path(wanted["path"])
    return weights.find(md5, path, revisions=revisions)


class Policy:
    """The model of a version; made on the first prediction, so that a version can be looked at without its weights."""

    def __init__(self, folder: Path):
        self._folder, self._loaded = folder, None

    def predict(self, prompts: Any, params: dict[str, Any] | None = None) -> Any:
        """A data frame with a column "prompt" (plain text, continued verbatim) to one with a column "completion".

        params: max_new_tokens (tokens), temperature (0: the likeliest token each time), seed.
        """
        import pandas as pd

        settings = {"max_new_tokens": 64, "temperature": 0.0, "seed": 0} | (params or {})
        texts = pd.DataFrame(prompts)["prompt"].explode().tolist()  # MLflow makes one row of a dict's whole list
        return pd.DataFrame({"completion": [self._complete(text, **settings) for text in texts]})

    def _complete(self, text: str, *, max_new_tokens: int, temperature: float, seed: int) -> str:
        import torch

        model, renderer = self._load()
        prompt_ids = renderer.prompt_ids(text_prompt(text))
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        with torch.inference_mode():
            ids = model.generate(
                torch.tensor([prompt_ids], device=model.device),
                attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long, device=model.device),
                max_new_tokens=max_new_tokens,
                pad_token_id=renderer.tokenizer.eos_token_id,
                **sampling,
            )
        return renderer.answer_text(prompt_ids, ids[0, len(prompt_ids) :].tolist())

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            from rankwise.rendering import Renderer

            folder = find_weights(self._folder)
            # Said, not left to the default, which asks at a terminal: code that comes with a model does not run here.
            model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, trust_remote_code=False).eval()
            self._loaded = model, Renderer(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        return self._loaded


def _load_pyfunc(path: str) -> Policy:
    return Policy(Path(path))
