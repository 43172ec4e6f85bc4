"""Engines that answer the prompts of a case, as their users would run them.

Each is a block that yields a function: prompts and the number of the pass in, [prompts][K][tokens] out. The model is
loaded, and a server started, on the way into the block, so a pass is sampling alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig, PreTrainedModel

from benchmarks.channel import Channel, Pace
from benchmarks.models import text_of
from benchmarks.settings import EngineSetting
from benchmarks.workload import PAD, Case, count_tokens, end_ids, longest_rollout, rows
from rankwise.endpoint import ServerEngine
from rankwise.plan import peak
from rankwise.sampling import Engine, Sampling, Wanted, seed_of
from rankwise.serving import serving
from rankwise.types import text_prompt

Prompt = Sequence[int]
Answers = list[list[list[int]]]  # [prompts][K][tokens]
Sampler = Callable[[Sequence[Prompt], int], Answers]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INDISPENSABLE = ("embedded", "generate")  # the question and the measure
PAGE, CPU_POSITIONS = 256, 1024  # of transformers' continuous batching: tokens of a page (its default), of a step


@dataclass(frozen=True, kw_only=True)
class Task:
    """What an engine is to do, and how it is set."""

    case: Case
    folder: str  # the model
    setting: EngineSetting
    greedy: bool = False
    serve: str = ""  # the command that starts a server

    @classmethod
    def of(cls, spec: dict[str, Any]) -> Task:
        setting = EngineSetting(**spec["setting"])
        greedy, serve = spec.get("greedy", False), spec.get("serve", "")
        return cls(case=Case.of(spec["case"]), folder=spec["folder"], setting=setting, greedy=greedy, serve=serve)

    @property
    def prompts_at_once(self) -> int:
        return max(1, self.setting.batch // self.case.k)

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            max_new_tokens=longest_rollout(self.case),
            temperature=0.0 if self.greedy else 1.0,
            stop_token_ids=end_ids(self.case),
        )

    @property
    def generation_config(self) -> GenerationConfig:
        """The same for transformers, whose own defaults would take the 50 likeliest tokens alone."""
        return GenerationConfig(
            max_new_tokens=longest_rollout(self.case),
            do_sample=not self.greedy,
            use_cache=True,
            **({} if self.greedy else {"top_k": 0, "top_p": 1.0, "temperature": 1.0}),
            num_return_sequences=1 if self.greedy else self.case.k,
            eos_token_id=list(end_ids(self.case)),
            pad_token_id=PAD,
        )


def run(spec: dict[str, Any], channel: Channel) -> None:
    """A pass over all prompts, once a go; before the first, one over as many as the engine takes together."""
    task = Task.of(spec)
    device, baseline = task.case.device, peak.now(task.case.device)
    prompts = [row.prompt for row in rows(task.case)]
    with ENGINES[spec["side"]](task) as answer:
        pace = Pace(channel, device, baseline)
        # The longest ones: what is compiled or kept for a size will do for all that follow.
        answer(sorted(prompts, key=len, reverse=True)[: task.prompts_at_once], 0)
        pace()
        for number in itertools.count(1):
            answers = answer(prompts, number)
            tokens = count_tokens(answers, task.case)
            pace(tokens=tokens, answers=len(prompts) * task.case.k, **_memory(spec["side"], device))


def agree(spec: dict[str, Any], channel: Channel) -> None:
    """Greedy answers of all engines to the prompts of the case, against plain forward passes and generate()'s.

    Tells margins: nats by which a token falls short of the likeliest one, at most; equal: the share of answers that are
    generate()'s to the last token; left_out: why an engine does not run here.
    """
    case = Case.of(spec["case"])
    prompts = [row.prompt for row in rows(case)]
    found: dict[str, Answers] = {}
    left_out: dict[str, str] = {}
    for engine, setting in spec["settings"].items():
        task = Task.of({**spec, "setting": setting, "greedy": True})
        try:
            with ENGINES[engine](task) as answer:
                found[engine] = answer(prompts, 0)
        except Exception as error:  # whatever keeps a library from running here is no fault of the others
            if engine in INDISPENSABLE:
                raise
            left_out[engine] = f"does not run here ({type(error).__name__}: {error})"
            continue
        count_tokens(found[engine], case)
    margins = _margins(spec["folder"], case, found)
    equal = {engine: _equal(answers, found["generate"]) for engine, answers in found.items() if "generate" in found}
    channel.say(margins=margins, equal=equal, left_out=left_out)


@torch.inference_mode()
def _margins(folder: str, case: Case, found: dict[str, Answers]) -> dict[str, float]:
    """By forward passes in float64 over prompt and answer together, without a cache, without padding."""
    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, use_safetensors=True, trust_remote_code=False)
        .to(case.device)
        .eval()
    )
    prompts = [row.prompt for row in rows(case)]
    return {
        engine: max(_margin(model, p, one) for p, mine in zip(prompts, answers, strict=True) for one in mine)
        for engine, answers in found.items()
    }


def _margin(model: PreTrainedModel, prompt: Prompt, answer: list[int]) -> float:
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits_TV = model(input_ids=ids[:, :-1], logits_to_keep=len(answer)).logits[0]
    chosen_T = logits_TV.gather(1, ids[0, -len(answer) :, None]).squeeze(1)
    return (logits_TV.amax(-1) - chosen_T).max().item()


def _equal(ours: Answers, theirs: Answers) -> float:
    both = [(a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)]
    return sum(a == b for a, b in both) / len(both)


@contextlib.contextmanager
def _embedded(task: Task) -> Iterator[Sampler]:
    """rankwise.generation."""
    from rankwise.generation import EmbeddedEngine

    setting = task.setting
    engine = EmbeddedEngine(
        Path(task.folder), task.sampling, precision=setting.precision, batch_sequences=setting.batch
    )
    yield _of_engine(engine, task)


@contextlib.contextmanager
def _generate(task: Task) -> Iterator[Sampler]:
    """transformers' generate(): prompts of like length together, padded on the left, K answers of each."""
    model, config = _model(task), task.generation_config
    if task.setting.cache == "static":
        config.cache_implementation = "static"
        config.compile_config = CompileConfig(dynamic=False)
        config.compile_config._compile_all_devices = True  # by default it compiles on accelerators alone

    def answer(prompts: Sequence[Prompt], number: int) -> Answers:
        torch.manual_seed(number)
        # The longest first: a static cache is then made once, for the longest.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        found: Answers = [[] for _ in prompts]
        for first in range(0, len(order), task.prompts_at_once):
            part = order[first : first + task.prompts_at_once]
            longest = len(prompts[part[0]])
            padded = [[PAD] * (longest - len(prompts[i])) + [*prompts[i]] for i in part]
            mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in part]
            made = model.generate(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=config,
            )
            for i, mine in zip(part, made[:, longest:].view(len(part), -1, made.shape[1] - longest).tolist()):
                found[i] = _repeated([_until(one, task) for one in mine], task)
        return found

    yield answer


@contextlib.contextmanager
def _continuous(task: Task) -> Iterator[Sampler]:
    """transformers' continuous batching, with room in its cache for as many answers as it takes together."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    case, model, config = task.case, _model(task), task.generation_config
    longest = max(len(row.prompt) for row in rows(case)) + longest_rollout(case)
    batching = ContinuousBatchingConfig(
        seed=case.seed,
        max_requests_per_batch=task.setting.batch,
        # Told nothing, it would take most of the machine's memory for its cache,
        page_size=PAGE,
        num_blocks=task.setting.batch * -(-longest // PAGE),
        # and on a CPU gigabytes for a dense mask of 8,192 positions a step, without being faster.
        max_batch_tokens=CPU_POSITIONS if case.device == "cpu" else None,
    )

    def answer(prompts: Sequence[Prompt], number: int) -> Answers:
        made = model.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=config,
            continuous_batching_config=batching,
            persistent_manager=True,
        )
        if bad := [one.error for one in made.values() if one.error]:
            raise RuntimeError(bad[0])
        found = iter([one.generated_tokens for one in made.values()])  # in the order of the prompts
        return [_repeated(list(itertools.islice(found, config.num_return_sequences)), task) for _ in prompts]

    yield answer
    model.destroy_cached_continuous_batching_manager()


@contextlib.contextmanager
def _server(task: Task) -> Iterator[Sampler]:
    """rankwise.endpoint, and the server that the command starts on the model."""
    environment = {name: value for name, value in os.environ.items() if name != "RANKWISE_ROLLOUTS_URL"}
    environment |= {"RANKWISE_SERVE": task.serve, "RANKWISE_ROLLOUTS_CONCURRENCY": str(task.prompts_at_once)}
    with tempfile.NamedTemporaryFile() as log, serving(Path(task.folder), environment, log=Path(log.name)) as endpoint:
        yield _of_engine(ServerEngine(endpoint=endpoint, sampling=task.sampling, source={}), task)


def _model(task: Task) -> PreTrainedModel:
    """The model in the precision itself, which is faster than autocast."""
    model = AutoModelForCausalLM.from_pretrained(
        task.folder, dtype=DTYPES[task.setting.precision], use_safetensors=True, trust_remote_code=False
    )
    return model.to(task.case.device).eval()


def _until(tokens: list[int], task: Task) -> list[int]:
    """An answer up to its first end token; what generate() pads it with after that is dropped."""
    ends = frozenset(end_ids(task.case))
    return tokens[: next((number for number, token in enumerate(tokens, start=1) if token in ends), len(tokens))]


def _repeated(answers: list[list[int]], task: Task) -> list[list[int]]:
    """K answers; a greedy one, which transformers gives once, K times."""
    return answers * task.case.k if task.greedy else answers


def _of_engine(engine: Engine, task: Task) -> Sampler:
    """An engine of rankwise's; every pass is a round of its own, with other seeds."""

    def answer(prompts: Sequence[Prompt], number: int) -> Answers:
        wanted = [
            Wanted(
                name=str(i),
                prompt=text_prompt(text_of(prompt)),
                prompt_ids=tuple(prompt),
                seeds=tuple(seed_of(task.case.seed, str(i), number, k) for k in range(task.case.k)),
            )
            for i, prompt in enumerate(prompts)
        ]
        found = dict(engine.answers(wanted))
        return [[list(one.token_ids or ()) for one in found[i]] for i in range(len(prompts))]

    return answer


def _memory(engine: str, device: str) -> dict[str, int | None]:
    """Bytes in use at most with those of the server's processes; on a GPU a server takes what it is told to take."""
    if engine != "server":
        return {}
    family = peak.highest("cpu") + sum(map(_highest_of, _descendants(os.getpid())))
    return {"peak": family if device == "cpu" else None}


def _descendants(process: int) -> Iterator[int]:
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            for child in map(int, file.read_text().split()):
                yield child
                yield from _descendants(child)


def _highest_of(process: int) -> int:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return 0


ENGINES: dict[str, Callable[[Task], contextlib.AbstractContextManager[Sampler]]] = {
    "embedded": _embedded,
    "generate": _generate,
    "continuous": _continuous,
    "server": _server,
}
