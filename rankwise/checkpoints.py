"""Models on disk: load, save, precision. Safetensors only, no pickle, no remote code unless asked for.

A model folder is an ordinary Hugging Face folder with its tokenizer beside the weights.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from rankwise import json_text
from rankwise.runtime import remote_code_allowed
from rankwise.types import Missing, UserError

# The library's bar for loading a handful of tensors says nothing that a log needs.
transformers_logging.disable_progress_bar()

# fp32: exact. medium: fp32 tensors, matmuls multiplied in bf16 where the CPU or GPU can, summed in fp32.
# bf16: autocast, the usual choice on a GPU.
Precision = Literal["fp32", "medium", "bf16"]

DTYPES = {  # as a safetensors header names what weights and optimizers are made of
    **{torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"},
}


def device() -> torch.device:
    """This process's accelerator where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def numerics(precision: Precision, where: torch.device) -> Iterator[None]:
    """Run a block in a precision; the reference and the policy must run in the same one."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
    try:
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder (a Path), or a folder or hub id (text); raises UserError where there is none or it has
    no EOS."""
    _check_there(folder)
    # Of a damaged file the library and its parts in Rust raise nearly anything, some of it only when it is used.
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code_allowed())
        tokenizer.decode(tokenizer("A text, 1\n")["input_ids"])
    except Exception as error:
        raise UserError(
            f"{folder}: no usable tokenizer ({_first_line(error)}); a tokenizer.json is expected"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{folder}: the tokenizer has no EOS token, so no answer could ever end; "
            "name one (eos_token) in its tokenizer_config.json"
        )
    # Lengths are limited by params and counted by the doctor; the library's warning names neither row nor remedy.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def load_causal_lm(folder: str | Path) -> PreTrainedModel:
    """A causal LM in float32 master weights; raises UserError where it cannot be used, saying why."""
    return _load(AutoModelForCausalLM, folder)


def load_reward_model(folder: str | Path) -> PreTrainedModel:
    """A sequence classifier with one output, the scalar reward."""
    return _load(AutoModelForSequenceClassification, folder, check=_check_one_output)


def new_reward_model(folder: str | Path, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """A causal LM's body with a fresh scalar head, which starts at zero so that every answer starts equal."""
    torch.manual_seed(seed)
    with _quiet():  # the library reports at length that the new head is new
        model = _load(AutoModelForSequenceClassification, folder, new_head=True, num_labels=1)
    nn.init.zeros_(model.score.weight)
    model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return model


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, where: object) -> None:
    """Raise UserError when the tokenizer can make ids that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens, the model embeds {rows}; "
            "they do not belong together: use the tokenizer that came with the model"
        )


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model folder that transformers.from_pretrained loads; adapters are merged into the weights."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    with _told(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Dropout off: preference learning compares two passes of one model, and noise in them is not signal."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _zero_dropouts(module)  # attention keeps a number of its own, copied from the config when it was built
    _zero_dropouts(model.config)
    return model


def save_state(
    path: Path, tensors: Mapping[str, Tensor], notes: dict[str, Any], *, whole: Callable[[Tensor], Tensor] = lambda t: t
) -> None:
    """Tensors and JSON-able notes in one safetensors file (the caller renames it into place).

    Tensors are written one after another, so that a sharded one is in memory as a whole only for its turn.

    Args:
        whole: puts a sharded tensor together; called once for each, in the order of tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"notes": json.dumps(notes)}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with _told(path), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            flat = whole(tensor.detach()).cpu().contiguous().flatten()
            file.write(memoryview(flat.view(torch.uint8).numpy()))
        # Renamed before its bytes are on the disk, it would be a whole name with half a file after a power cut.
        file.flush()
        os.fsync(file.fileno())


def load_state(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """What save_state wrote, each tensor read when it is asked for; raises UserError on a damaged file."""
    try:
        saved = _Saved(path)
        notes = json_text.parse(saved.metadata.get("notes", "{}"))
    except (SafetensorError, OSError, json_text.NotJson) as error:
        raise UserError(f"{path}: not a readable checkpoint ({error}); delete it and run again") from error
    if not isinstance(notes, dict):
        raise UserError(f"{path}: not a readable checkpoint (its notes are no object); delete it and run again")
    return saved, notes


class _Saved(Mapping[str, Tensor]):
    def __init__(self, path: Path):
        self._handle = safe_open(path, framework="pt").__enter__()
        self.metadata = self._handle.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        return self._handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._handle.keys())

    def __len__(self) -> int:
        return len(self._handle.keys())


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the system says of a write (disk full, no permission), with the file's name."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: cannot be written ({error}); mend that and run the same command again: it continues from the "
            "last checkpoint"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _load(
    auto: type,
    folder: str | Path,
    *,
    new_head: bool = False,
    check: Callable[[str | Path, PretrainedConfig], None] = lambda *_: None,
    **overrides: Any,
) -> PreTrainedModel:
    _check_there(folder)
    # Of a damaged config or file of weights the library raises nearly anything.
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=remote_code_allowed(), **overrides)
        check(folder, config)
        _check_depth(Path(folder), config)
        model, found = auto.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=remote_code_allowed(),
            output_loading_info=True,
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{folder}: not a usable model ({_first_line(error)}); "
            "a Hugging Face folder or hub id with config.json and *.safetensors is expected "
            "(weights in .bin files are pickles and are refused: convert them to safetensors)"
        ) from error
    # The library would begin with random numbers in their place.
    if missing := sorted(name for name in found["missing_keys"] if not (new_head and name.startswith("score."))):
        raise UserError(
            f"{folder}: its files lack {len(missing)} of the model's weights: {', '.join(missing[:5])}; "
            "take a whole copy, or the config.json that belongs to these weights"
        )
    return without_dropout(model)


def _check_one_output(folder: str | Path, config: PretrainedConfig) -> None:
    if config.num_labels != 1:
        raise UserError(
            f"{folder}: a reward model has one output, this one has {config.num_labels} "
            f"({', '.join(config.architectures or ['of no architecture'])}); give a checkpoint with num_labels = 1"
        )


def _check_there(folder: str | Path) -> None:
    # Or the library would look for it on the hub, and say that it has no network. Text may name a model there.
    if isinstance(folder, Path) and not folder.is_dir():
        raise Missing(folder, "model folder")


def _check_depth(folder: Path, config: PretrainedConfig) -> None:
    """Raise UserError where config.json asks for more layers than there are tensors: to build them could take hours."""
    files = sorted(folder.glob("*.safetensors"))
    layers = getattr(config, "num_hidden_layers", None)
    if not files or not isinstance(layers, int):
        return
    tensors = 0
    for file in files:
        with safe_open(file, framework="pt") as held:
            tensors += len(held.keys())
    if layers > tensors:
        raise UserError(
            f"{folder}: config.json says {layers} layers, and the weights are {tensors} tensors; they do not belong "
            "together: take both from one copy"
        )


def _zero_dropouts(holder: object) -> None:
    for name, value in vars(holder).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(holder, name, 0.0)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
