"""Stage base_model: the model that SFT starts from, as a plain folder that later stages read.

"embedded" trains a byte-pair tokenizer on the SFT texts and makes a small Llama with random weights; anything else
is a folder below data/source or a hub id, checked (safetensors, EOS, vocabulary) and copied, so that no later
stage meets the network or a moved folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.rows import RowTable
from rankwise.runtime import remote_code_allowed
from rankwise.types import UserError, show_prompt
from tasks.params import below, param
from tasks.stage import Stage, main, output_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Embedded:
    vocabulary: int = param(2560, "tokens in the tokenizer", ge=300)
    hidden: int = param(256, "width", ge=8)
    layers: int = param(2, "transformer blocks", ge=1)
    heads: int = param(4, "attention heads", ge=1)
    context: int = param(256, "longest prompt + answer, tokens", ge=16)


@dataclass(frozen=True, kw_only=True)
class Params:
    source: str = param("embedded", '"embedded", a folder below data/source, or a Hugging Face hub id')
    revision: str | None = param(None, "commit of the hub model; pin it, or the result can change under you")
    seed: int = param(0, "seed of the random weights")
    embedded: Embedded = param(Embedded, "the embedded model, where source is embedded")


@dataclass(frozen=True, kw_only=True)
class Paths:
    source: Path = Path("data/source")
    prompts: Path = Path("data/prompts")
    model: Path = Path("models/base")
    report: Path = Path("reports/base_model")


def run(params: Params, paths: Paths, stage: Stage) -> None:
    from rankwise.checkpoints import check_vocabulary, load_causal_lm, load_tokenizer, save_model

    if params.source == "embedded":
        model, tokenizer = _embedded(params, paths.prompts / "sft.parquet")
    else:
        source = _resolve(params, paths.source)
        tokenizer = load_tokenizer(source)
        model = load_causal_lm(source)
    check_vocabulary(model, tokenizer, where=f"base_model.source {params.source!r}")
    with output_folder(paths.model) as folder:
        save_model(model, tokenizer, folder)
    parameters = sum(p.numel() for p in model.parameters())
    stage.log(f"{type(model).__name__}, {parameters:,} parameters, {len(tokenizer)} tokens -> {paths.model}")
    stage.finish({"parameters": parameters, "vocabulary": len(tokenizer)})


def _resolve(params: Params, source: Path) -> str | Path:
    folder = below(source, params.source, where="base_model.source")
    if folder.is_dir():
        return folder
    if params.source.startswith((".", "~")) or params.source.count("/") != 1:
        raise UserError(
            f"base_model.source: {params.source!r} is neither a folder below {source} nor a hub id (owner/name); "
            f"put or link the model's folder there, or write embedded"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return snapshot_download(
            params.source,
            revision=params.revision,
            allow_patterns=[
                "*.json",
                "*.safetensors",
                "*.model",
                "*.txt",
                "*.jinja",
                *(["*.py"] * remote_code_allowed()),
            ],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"base_model.source: {params.source!r} is no folder below {source}, and the hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); check the name, or download it into {source}"
        ) from error


def _embedded(params: Params, texts: Path) -> tuple:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    rows = RowTable(texts)
    if not len(rows):
        raise UserError(f"{texts}: no text to train the embedded tokenizer on; set prompts.source or base_model.source")
    tokenizer = _tokenizer((show_prompt(row.prompt) + row.answers[0].text for row in rows), params.embedded)
    spec = params.embedded
    torch.manual_seed(params.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=spec.hidden,
            intermediate_size=spec.hidden * 8 // 3 // 16 * 16,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            max_position_embeddings=spec.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model, tokenizer


def _tokenizer(texts, spec: Embedded) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=spec.context,
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    raise SystemExit(main("base_model", Params, Paths, run))
