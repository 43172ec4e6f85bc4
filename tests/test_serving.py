"""A server around a block: it is there when the block begins and gone when it ends, however that is.

The real ones answer here: `transformers serve` always, and whatever RANKWISE_SERVE or PATH has, vLLM above all, in the
slow tests.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from test_rendering import CHATML, tokenizer
from test_scoring import tiny

from rankwise.checkpoints import save_model
from rankwise.client import Endpoint
from rankwise.endpoint import ServerEngine
from rankwise.rendering import Renderer
from rankwise.sampling import Sampling, Wanted, seed_of
from rankwise.serving import VLLM, serving
from rankwise.types import Message, Unavailable, UserError, text_prompt

# As a server: a worker in the background that ignores SIGTERM, and an empty list of models. Options come first.
SERVER = """
    import http.server, os, signal, subprocess, sys, time
    model, port, pids, *how = sys.argv[1:]
    print("loading", model, flush=True)
    worker = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(60)"])
    open(pids, "w").write(f"{os.getpid()} {worker.pid}")
    if "dies" in how:
        sys.exit("no room in memory for " + model)
    if "hangs" in how:
        time.sleep(60)
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(500)
            self.end_headers()
    http.server.HTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
"""


@pytest.fixture
def server(tmp_path):
    """The environment that starts the pretended server: server("dies")."""
    (tmp_path / "server.py").write_text(textwrap.dedent(SERVER))

    def environment(*how: str) -> dict[str, str]:
        words = [sys.executable, str(tmp_path / "server.py"), "{model}", "{port}", str(tmp_path / "pids"), *how]
        return {**os.environ, "RANKWISE_SERVE": shlex.join(words)}

    return environment


def pids(tmp_path: Path) -> list[int]:
    return [int(pid) for pid in (tmp_path / "pids").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(process_ids: list[int], within_s: float = 5.0) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not any(map(alive, process_ids)):
            return True
        time.sleep(0.05)
    return False


# Starting and stopping


def test_the_server_and_its_workers_end_with_the_block(tmp_path, server, capfd):
    with serving(tmp_path / "a model", server(), log=tmp_path / "log") as endpoint:
        assert endpoint.url.startswith("http://127.0.0.1:") and endpoint.model == str(tmp_path / "a model")
        assert all(map(alive, pids(tmp_path)))
    assert gone(pids(tmp_path), 0.5)
    assert (tmp_path / "log").read_text().startswith(f"loading {tmp_path / 'a model'}\n")
    assert "server: ready after" in capfd.readouterr().err


def test_the_server_ends_with_the_block_that_is_stopped(tmp_path, server):
    with pytest.raises(KeyboardInterrupt), serving(tmp_path, server(), log=tmp_path / "log"):
        raise KeyboardInterrupt
    assert gone(pids(tmp_path), 0.5)


def test_the_server_ends_with_a_parent_that_is_killed(tmp_path, server):
    program = (
        "import os, pathlib, signal\nfrom rankwise.serving import serving\n"
        f"with serving(pathlib.Path('m'), os.environ, log=pathlib.Path({str(tmp_path / 'log')!r})):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**server(), "PYTHONPATH": str(Path(__file__).parent.parent)}
    killed = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    main, worker = pids(tmp_path)
    assert gone([main])
    os.kill(worker, signal.SIGKILL)  # a worker that ignores SIGTERM is its server's to end


def test_a_server_that_dies_is_told_with_the_end_of_its_log(tmp_path, server):
    message = r"died before it answered\nthe server ended with status 1; the end of .*log:(.|\n)*no room in memory"
    with pytest.raises(Unavailable, match=message), serving(tmp_path, server("dies"), log=tmp_path / "log"):
        pass
    assert gone(pids(tmp_path), 0.5)


def test_a_server_that_does_not_answer_in_time_is_told_and_stopped(tmp_path, server):
    with (
        pytest.raises(UserError, match=r"did not answer within 1 s; the end of .*log:\nloading"),
        serving(tmp_path, server("hangs"), log=tmp_path / "log", start_limit_s=1),
    ):
        pass
    assert gone(pids(tmp_path), 0.5)


def test_a_server_that_dies_at_work_is_told_with_what_could_not_be_done(tmp_path, server):
    with (
        pytest.raises(Unavailable, match=r"nothing answers at (.|\n)*the server ended with status -9; the end of"),
        serving(tmp_path, server(), log=tmp_path / "log") as endpoint,
    ):
        os.kill(pids(tmp_path)[0], signal.SIGKILL)
        assert gone(pids(tmp_path)[:1])
        list(ServerEngine(endpoint=endpoint, sampling=Sampling(max_new_tokens=1), source={}).answers(wanted(1)))


def test_a_server_that_runs_is_used_and_nothing_is_started(tmp_path, server):
    environment = {**server("dies"), "RANKWISE_ROLLOUTS_URL": "http://h:1/v1", "RANKWISE_ROLLOUTS_CONCURRENCY": "3"}
    with serving(tmp_path, environment, log=tmp_path / "log") as endpoint:
        assert endpoint == Endpoint(url="http://h:1/v1", concurrency=3)
    assert not (tmp_path / "log").exists()


def test_without_a_server_both_ways_to_one_are_named(tmp_path):
    with pytest.raises(UserError, match=r"RANKWISE_ROLLOUTS_URL.*RANKWISE_SERVE"), serving(tmp_path, {"PATH": ""}):
        pass


def test_vllm_is_started_where_it_is_on_path(tmp_path, server):
    vllm = tmp_path / "bin" / "vllm"
    vllm.parent.mkdir()
    vllm.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/server.py "$2" "$6" {tmp_path}/pids "$@"\n')
    vllm.chmod(0o755)
    server()
    with serving(tmp_path / "m", {"PATH": str(vllm.parent)}, log=tmp_path / "log") as endpoint:
        assert endpoint.model == str(tmp_path / "m")


@pytest.mark.parametrize(
    "command, message",
    [
        ("serve {model}", r"RANKWISE_SERVE is 'serve \{model\}'; it has to hold \{model\} and \{port\}"),
        ("no-such-server {model} {port}", "no-such-server: No such file"),
    ],
)
def test_a_command_that_cannot_work_is_named(tmp_path, command, message):
    with (
        pytest.raises(UserError, match=message),
        serving(tmp_path, {**os.environ, "RANKWISE_SERVE": command}, log=tmp_path / "log"),
    ):
        pass


# Real servers

TRANSFORMERS = f"{Path(sys.executable).parent / 'transformers'} serve {{model}} --host 127.0.0.1 --port {{port}}"
TEXTS = tuple(map(text_prompt, ("on a", "the film", "word word word", "x")))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder, the model, its renderer); sizes that vLLM's kernels know."""
    folder = tmp_path_factory.mktemp("served") / "model"
    made = tokenizer(bos=True, template=CHATML)
    weights = tiny(vocab_size=len(made), hidden_size=64, num_attention_heads=2, head_dim=32, num_key_value_heads=2)
    save_model(weights, made, folder)
    return folder, weights, Renderer(made)


@pytest.fixture(scope="module")
def transformers_serve(model, tmp_path_factory):
    """With an empty cache of the hub, so that its list of models is a status 500."""
    environment = {**os.environ, "RANKWISE_SERVE": TRANSFORMERS, "HF_HOME": str(tmp_path_factory.mktemp("hub"))}
    with serving(model[0], environment, log=tmp_path_factory.mktemp("log") / "log") as endpoint:
        with pytest.raises(urllib.error.HTTPError, match="500"):
            urllib.request.urlopen(f"{endpoint.url}/models")
        yield endpoint


def wanted(k: int, renderer: Renderer | None = None, prompts=TEXTS) -> list[Wanted]:
    return [
        Wanted(
            name=f"p{i}",
            prompt=prompt,
            prompt_ids=tuple(renderer.prompt_ids(prompt)) if renderer else (1,),
            seeds=tuple(seed_of(0, f"p{i}", 0, n) for n in range(k)),
        )
        for i, prompt in enumerate(prompts)
    ]


def generated(weights, prompt_ids, *, seed: int = 0, **options) -> list[int]:
    """The library's own answer."""
    torch.manual_seed(seed)
    ids = torch.tensor([prompt_ids])
    options = {"max_new_tokens": 12, "eos_token_id": 2, "pad_token_id": 0, "top_k": 0, **options}
    return weights.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()


def answers(endpoint: Endpoint, prompts: list[Wanted], **sampling) -> tuple[ServerEngine, list]:
    engine = ServerEngine(endpoint=endpoint, sampling=Sampling(**{"max_new_tokens": 12, **sampling}), source={})
    got = dict(engine.answers(prompts))
    return engine, [got[i] for i in range(len(prompts))]


CHAT = ((Message(role="user", content="hi"),), (Message(role="system", content="s"), Message(role="user", content="u")))


@pytest.mark.parametrize("prompts", [TEXTS, CHAT])
def test_transformers_serve_answers_greedily_as_generate_does(transformers_serve, model, prompts):
    _, weights, renderer = model
    asked = wanted(1, renderer, prompts)
    engine, got = answers(transformers_serve, asked, temperature=0.0)
    assert engine.version == "transformers serve"
    for one, (answer,) in zip(asked, got):
        assert answer.text == renderer.text(generated(weights, one.prompt_ids, do_sample=False))
        assert answer.token_ids is None and answer.logps is None


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.7, "top_k": 9, "repetition_penalty": 1.4}, {"top_p": 0.8, "min_p": 0.02}],
)
def test_transformers_serve_draws_each_answer_with_its_seed_and_settings(transformers_serve, model, sampling):
    _, weights, renderer = model
    asked = wanted(2, renderer)
    _, got = answers(transformers_serve, asked, **sampling)
    for one, sampled in zip(asked, got):
        assert [a.seed for a in sampled] == [one.seeds[0] % 2**31, one.seeds[0] % 2**31 + 1]
        for answer in sampled:
            theirs = generated(weights, one.prompt_ids, do_sample=True, seed=answer.seed, **sampling)
            assert answer.text == renderer.text(theirs)


def test_transformers_serve_stops_at_a_stop_string_and_the_text_ends_before_it(transformers_serve, model):
    _, _, renderer = model
    asked = wanted(1, renderer)
    _, whole = answers(transformers_serve, asked, temperature=0.0)
    stop = whole[0][0].text[2]
    _, got = answers(transformers_serve, asked, temperature=0.0, stop=(stop,))
    for (cut,), (full,) in zip(got, whole):
        assert cut.text == full.text.split(stop)[0]
    assert got[0][0].finish_reason == "stop"


def test_transformers_serve_would_take_stop_tokens_for_the_models_own(transformers_serve, model):
    with pytest.raises(UserError, match=r"stop_token_ids = \(7,\) cannot be had"):
        answers(transformers_serve, wanted(1, model[2]), stop_token_ids=(7,))


# vLLM, or what else RANKWISE_SERVE starts that gives token ids


@pytest.fixture(scope="module")
def vllm(model, tmp_path_factory):
    if not (os.environ.get("RANKWISE_SERVE") or shutil.which("vllm")):
        pytest.skip("no vLLM: neither RANKWISE_SERVE nor vllm on PATH")
    # In float32, so that a word more than rounding is a defect.
    command = os.environ.get("RANKWISE_SERVE", f"{VLLM} --dtype float32 --max-model-len 128 --enforce-eager")
    environment = {**os.environ, "RANKWISE_SERVE": command}
    with serving(model[0], environment, log=tmp_path_factory.mktemp("vllm") / "log") as endpoint:
        yield endpoint


def logps(weights, prompt_ids, token_ids) -> np.ndarray:
    """Of each token under the model: temperature 1, whole vocabulary."""
    with torch.no_grad():
        logits = weights(torch.tensor([[*prompt_ids, *token_ids]])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(token_ids)), torch.tensor(token_ids)].numpy()


@pytest.mark.slow
def test_vllm_gives_every_token_sampled_and_its_raw_logp(vllm, model):
    """The end token included; log-probs are of the model itself, whatever is sampled with."""
    _, weights, renderer = model
    asked = wanted(16, renderer)
    engine, got = answers(vllm, asked, temperature=1.3, top_k=200, repetition_penalty=1.3, max_new_tokens=40)
    assert engine.version.startswith("vllm ")
    assert {answer.finish_reason for sampled in got for answer in sampled} == {"stop", "length"}
    for one, sampled in zip(asked, got):
        assert len({answer.token_ids for answer in sampled}) > 1
        for answer in sampled:
            assert (answer.token_ids[-1] == 2) == (answer.finish_reason == "stop")
            np.testing.assert_allclose(answer.logps, logps(weights, one.prompt_ids, answer.token_ids), atol=0.02)


@pytest.mark.slow
def test_vllm_draws_choice_k_with_seed_plus_k(vllm, model):
    """One request of four answers is four requests of one, in any company: what a row's key promises."""
    asked = wanted(4, model[2])
    _, together = answers(vllm, asked)
    _, again = answers(vllm, asked[::-1])
    assert [[a.token_ids for a in s] for s in together] == [[a.token_ids for a in s] for s in again[::-1]]
    for k in range(1, 4):
        alone = [
            Wanted(name=one.name, prompt=one.prompt, prompt_ids=one.prompt_ids, seeds=(one.seeds[0] % 2**31 + k,))
            for one in asked
        ]
        _, singles = answers(vllm, alone)
        assert [s[0].token_ids for s in singles] == [s[k].token_ids for s in together]


@pytest.mark.slow
def test_vllm_is_greedy_as_generate_is(vllm, model):
    _, weights, renderer = model
    asked = wanted(2, renderer)
    _, got = answers(vllm, asked, temperature=0.0)
    for one, sampled in zip(asked, got):
        assert [list(a.token_ids) for a in sampled] == [generated(weights, one.prompt_ids, do_sample=False)] * 2


@pytest.mark.slow
def test_vllm_cuts_the_text_before_a_stop_string_and_keeps_its_tokens(vllm, model):
    _, _, renderer = model
    asked = wanted(1, renderer)
    ids = answers(vllm, asked, temperature=0.0)[1][0][0].token_ids
    stop = renderer.text(ids[2:3])
    (cut,) = answers(vllm, asked, temperature=0.0, stop=(stop,))[1][0]
    assert cut.text == renderer.text(ids).split(stop)[0] and cut.finish_reason == "stop"
    assert cut.token_ids == ids[: len(cut.token_ids)] and stop in renderer.text(cut.token_ids)


@pytest.mark.slow
def test_vllm_ends_at_a_stop_token_and_keeps_it(vllm, model):
    asked = wanted(1, model[2])
    ids = answers(vllm, asked, temperature=0.0)[1][0][0].token_ids
    (cut,) = answers(vllm, asked, temperature=0.0, stop_token_ids=(ids[3],))[1][0]
    assert cut.token_ids == ids[: ids.index(ids[3]) + 1] and cut.finish_reason == "stop"
