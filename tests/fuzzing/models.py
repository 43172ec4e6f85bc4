"""Readers of models: checkpoints of training, tokenizers, weights and their config, chat templates."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from rankwise import checkpoints, resuming
from rankwise.parallel import processes
from rankwise.rendering import Renderer
from rankwise.types import Answer, Message, Row, text_prompt
from tasks.judges import _model_type

from . import octets, trees
from .law import Files, holds, reader

STATE = "state.safetensors"
IDENTITY = {"rows": "r", "tokenizer": "t"}
_FILES: dict[str, Files] = {}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}{{ raise_exception('no system here') }}"
    "{% endif %}<s>{{ m['role'] }}: {{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def _folder() -> Files:
    """A small model with its tokenizer, as save_model writes one."""
    if "model" not in _FILES:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=["<s>", "</s>"], show_progress=False)
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
        bpe.train_from_iterator(["the film was good, the plot was bad"] * 4, trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
        tokenizer.chat_template = TEMPLATE
        torch.manual_seed(0)
        shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, max_position_embeddings=64))
        with tempfile.TemporaryDirectory() as made:
            checkpoints.save_model(model, tokenizer, Path(made))
            _FILES["model"] = {path.name: path.read_bytes() for path in sorted(Path(made).iterdir())}
    return _FILES["model"]


def _spoilt_folder(random: Random, names: tuple[str, ...]) -> Files:
    files = dict(_folder())
    name = random.choice([name for name in files if name.startswith(names)])
    if random.random() < 0.05:
        del files[name]
    elif name.endswith(".json") and random.random() < 0.6:
        files[name] = trees.octets(trees.as_json(random, trees.changed(random, json.loads(files[name]))))
    elif name.endswith(".safetensors"):
        files[name] = safetensors(random, files[name])
    else:
        files[name] = octets.spoilt(random, files[name], random.choice([*files.values()]))
    return {f"model/{name}": data for name, data in files.items()}


def safetensors(random: Random, data: bytes) -> bytes:
    """A safetensors file whose header lies, or whose bytes are spoilt."""
    kind = random.randrange(6)
    if kind == 0:
        return octets.spoilt(random, data, data)
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if kind == 1:
        lie = random.choice((0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1))
        return lie.to_bytes(8, "little") + data[8:]
    if kind == 2:
        name = random.choice([*header])
        field, value = random.choice(
            (
                ("dtype", random.choice(("F16", "F64", "I64", "F8_E4M3", "Q4", "", None))),
                ("shape", random.choice(([], [0], [-1], [2**63], [1, 1], [2**32, 2**32], "x"))),
                ("data_offsets", random.choice(([0, 0], [0, 4], [4, 0], [-4, 0], [0, 2**63], [0], None))),
            )
        )
        header[name] = {**header[name], field: value}
    else:
        header = trees.changed(random, header)
    text = trees.octets(trees.as_json(random, header))
    if random.random() < 0.8:
        text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def _module() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    return module, torch.optim.AdamW(module.parameters(), lr=0.1)


def _checkpoint(random: Random) -> Files:
    if "state" not in _FILES:
        module, optimizer = _module()
        module(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        notes = {
            "step": 4,
            "epochs_told": 1,
            "counters": {"tokens": 8, "seen": 4, "seconds": 1.5},
            "points": [{"step": 4, "loss": 0.5}],
        }
        with tempfile.TemporaryDirectory() as made:
            path = Path(made) / STATE
            named = dict(module.named_parameters())
            resuming.save(path, named, optimizer, {**notes, "identity": IDENTITY}, processes())
            _FILES["state"] = {STATE: path.read_bytes()}
    data = _FILES["state"][STATE]
    if random.random() < 0.3:  # its notes, which are JSON in the JSON of the header
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        notes = json.loads(header["__metadata__"]["notes"])
        header["__metadata__"]["notes"] = trees.as_json(random, trees.changed(random, notes))
        text = trees.octets(json.dumps(header))
        return {STATE: len(text).to_bytes(8, "little") + text + data[8 + size :]}
    return {STATE: safetensors(random, data)}


def _read_checkpoint(folder: Path) -> None:
    module, optimizer = _module()
    before = {name: tuple(p.shape) for name, p in module.named_parameters()}
    notes = resuming.load(folder / STATE, dict(module.named_parameters()), optimizer, IDENTITY, processes())
    holds(notes is not None, "a checkpoint that is there is none")
    holds(type(notes["step"]) is int and type(notes["epochs_told"]) is int, "a step that is no number")
    holds(all(isinstance(value, (int, float)) for value in notes["counters"].values()), "counters that are none")
    holds(isinstance(notes["points"], list), "points that are none")
    holds({name: tuple(p.shape) for name, p in module.named_parameters()} == before, "weights of another shape")
    for p, state in optimizer.state.items():
        holds(set(state) == {"step", "exp_avg", "exp_avg_sq"}, "an optimizer's state in parts")
        holds(state["exp_avg"].shape == p.shape and state["step"].shape == (), "an optimizer's state of another shape")


def _quietly(read) -> Any:
    def inner(folder: Path) -> None:
        logging.disable(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(folder / "model")
        finally:
            logging.disable(logging.NOTSET)

    return inner


def _read_tokenizer(folder: Path) -> None:
    tokenizer = checkpoints.load_tokenizer(folder)
    renderer = Renderer(tokenizer)
    row = Row(id="r1", prompt=text_prompt("the film"), answers=(Answer(text=" was good"),))
    rendered = renderer.render(row)
    holds(all(type(i) is int for i in rendered.prompt_ids), "tokens that are none")


def _read_model(folder: Path) -> None:
    model = checkpoints.load_causal_lm(folder)
    holds(all(p.dtype == torch.float32 for p in model.parameters()), "weights in another precision")
    holds(all(p.device.type != "meta" for p in model.parameters()), "weights that are not there")
    _model_type(folder)


def _chat(random: Random) -> Files:
    files = {name: data for name, data in _folder().items() if name.startswith(("tokenizer", "chat", "config"))}
    template = octets.spoilt(random, TEMPLATE.encode()) if random.random() < 0.8 else TEMPLATE.encode()
    turns = [
        [random.choice(("user", "assistant", "system", "text", "")), random.choice(trees.TEXTS[:20])] for _ in range(3)
    ]
    turns = [[role, said.encode("utf-8", "replace").decode()] for role, said in turns[: random.randrange(1, 4)]]
    files = {f"model/{name}": data for name, data in files.items()}
    return files | {"model/chat_template.jinja": template, "model/turns.json": json.dumps(turns).encode()}


def _read_chat(folder: Path) -> None:
    renderer = Renderer(checkpoints.load_tokenizer(folder), max_prompt_tokens=20, max_answer_tokens=9)
    turns = json.loads((folder / "turns.json").read_bytes())
    row = Row(
        id="r1",
        prompt=tuple(Message(role=role, content=said) for role, said in turns),
        answers=(Answer(text=" good", rank=0), Answer(text="", rank=1, finish_reason="length")),
    )
    rendered = renderer.render(row)
    holds(len(rendered.answers_ids) == 2 and len(rendered.prompt_ids) <= 20, "a row of other tokens")


reader(name="checkpoint", make=_checkpoint, read=_read_checkpoint, weight=3.0)
reader(
    name="tokenizer",
    make=lambda r: _spoilt_folder(r, ("tokenizer", "chat_template", "special")),
    read=_quietly(_read_tokenizer),
    weight=0.15,
    places=("model",),
)
reader(
    name="model",
    make=lambda r: _spoilt_folder(r, ("model", "config", "generation")),
    read=_quietly(_read_model),
    weight=0.06,
    places=("model",),
)
reader(name="chat", make=_chat, read=_quietly(_read_chat), weight=0.2, places=("model", "r1"))
