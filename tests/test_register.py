"""Laws of registering: one version for each set of weights, traceable, gated, and MLflow optional."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from rankwise.types import UserError
from tasks import lineage, register, tracking
from tasks.servable import Policy, find_weights
from tasks.stage import Stage
from tasks.tracking_worker import SETTINGS

METRICS = {
    "win_rate": {"judge": {"mean": 0.86, "low": 0.81, "high": 0.9}, "gold": {"mean": 0.5, "low": 0.4, "high": 0.6}},
    "kl": {"mean": 12.0, "low": 11.0, "high": 13.0},
    "preference_accuracy": 0.7,
}
PATHS = register.Paths()


def params(**changes) -> register.Params:
    return register.Params(**{"at_least": {"win_rate.judge.low": 0.5}, "at_most": {}, **changes})


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory) -> Path:
    """A random Llama of a few thousand weights with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "policy"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, eos_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_policy):
    """A project in which all stages before register are done."""
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("RANKWISE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for folder in (PATHS.policy, PATHS.sft):
        shutil.copytree(tiny_policy, folder)
    PATHS.evaluation.mkdir(parents=True)
    (PATHS.evaluation / "metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "dvc.lock").write_text("stages: {}\n")
    return tmp_path


class Here:
    """The worker's work in this process: its own process is test_tracking's subject, and costs seconds a time."""

    def __init__(self):
        from tasks.tracking_runs import Recorder

        self.recorder = Recorder({"kind": "stage", "name": "register", "params": {}, "tags": {}, "ms": 0})

    def ask(self, message, patience_s=0.0):
        message = json.loads(json.dumps(message))
        return self.recorder.metrics([message]) if message["do"] == "metrics" else self.recorder.handle(message)

    send = ask


def run(tracked: bool, **changes) -> dict:
    """Run the stage; returns registration.json."""
    tracker = tracking.Tracker(Here() if tracked else None)
    register.run(params(**changes), PATHS, Stage("register", tracker=tracker, report=PATHS.report))
    return json.loads((PATHS.report / "registration.json").read_text())


def change_weights() -> None:
    """Another policy, as far as anybody can tell from its bytes."""
    (PATHS.policy / "generation_config.json").write_text(json.dumps({"changed": os.urandom(4).hex()}))


def client(project: Path):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{project}/home/mlflow/mlflow.db"
    return MlflowClient(uri, registry_uri=uri)


def test_same_policy_registers_once_and_aliases_follow_the_gates(project):
    run(tracked=True)
    run(tracked=True)
    assert [one.version for one in client(project).search_model_versions("name = 'rankwise-policy'")] == [1]
    first = client(project).get_model_version("rankwise-policy", "1")
    assert first.aliases == ["champion"]
    assert first.tags == {
        "policy_md5": lineage.md5_of(PATHS.policy),
        "sft_md5": lineage.md5_of(PATHS.sft),
        "dvc.lock_md5": lineage.md5_of(project / "dvc.lock"),
        "gates": "passed",
        "policy_path": "models/policy",
    }
    assert "win_rate.judge.low = 0.81, at least 0.5: passed" in first.description

    change_weights()
    run(tracked=True, at_least={"win_rate.gold.low": 0.5})
    assert client(project).get_model_version("rankwise-policy", "2").aliases == [], "it failed a gate"
    run(tracked=True)
    assert client(project).get_model_version("rankwise-policy", "2").aliases == ["challenger"]
    assert client(project).get_model_version("rankwise-policy", "1").aliases == ["champion"]


def test_a_version_answers_prompts_with_its_own_weights_and_names_the_mend_without_them(project, monkeypatch):
    """Loaded as a consumer does it, in a process that has only what the version carries."""
    monkeypatch.setenv("RANKWISE_TRACKING", "on")
    with tracking.stage_run("register", {}) as tracker:  # once through a worker, as a stage does it
        register.run(params(), PATHS, Stage("register", tracker=tracker, report=PATHS.report))
    code = (
        "import shutil, sys, mlflow\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "load = lambda: mlflow.pyfunc.load_model('models:/rankwise-policy@champion')\n"
        "model, late = load(), load()\n"
        "signature = model.metadata.signature\n"
        "print(signature.inputs.input_names(), signature.outputs.input_names(), [p.name for p in signature.params])\n"
        "print(model.predict({'prompt': ['The film', 'A']}, params={'max_new_tokens': 3}).to_json())\n"
        "shutil.rmtree('models/policy')\n"
        "late.predict({'prompt': ['The film']})"
    )
    command = [sys.executable, "-c", code, f"sqlite:///{project}/home/mlflow/mlflow.db"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60)
    signature, completions = told.stdout.splitlines()
    assert signature == "['prompt'] ['completion'] ['max_new_tokens', 'temperature', 'seed']"
    assert len(json.loads(completions)["completion"]) == 2
    assert told.returncode != 0 and "dvc pull models/policy" in told.stderr
    artifacts = [file.suffix for file in (project / "home/mlflow/artifacts").rglob("*")]
    assert ".safetensors" not in artifacts and ".pkl" not in artifacts, "weights stay in DVC; nothing is pickled"


def test_other_weights_than_the_versions_own_are_refused(project, tmp_path):
    pointer = tmp_path / "pointer"
    pointer.mkdir()
    wanted = {"path": str(PATHS.policy), "md5": lineage.md5_of(PATHS.policy)}
    (pointer / "pointer.json").write_text(json.dumps(wanted))
    assert find_weights(pointer) == PATHS.policy
    change_weights()
    with pytest.raises(UserError, match=r"other weights.*dvc pull"):
        find_weights(pointer)


def test_a_policy_samples_the_same_answer_for_the_same_seed(tiny_policy):
    policy = Policy(tiny_policy)
    ask = lambda seed: policy.predict({"prompt": ["The film"]}, {"temperature": 1.0, "seed": seed, "max_new_tokens": 8})
    assert ask(1).equals(ask(1)) and not ask(1).equals(ask(2))


def test_a_copy_is_whole_when_weights_are_asked_for(project):
    run(tracked=True, log_weights=True)
    (copy,) = (project / "home/mlflow/artifacts").rglob("model.safetensors")
    assert lineage.md5_of(copy.parent) == lineage.md5_of(PATHS.policy)
    requirements = next((project / "home/mlflow/artifacts").rglob("requirements.txt")).read_text()
    assert "transformers==" in requirements and "torchvision" not in requirements


def test_without_mlflow_the_record_is_the_same_and_the_mend_is_named(project, capsys):
    tracked = run(tracked=True)
    capsys.readouterr()
    assert run(tracked=False) == tracked
    assert "register it later: python -m tasks.register" in capsys.readouterr().err


def test_the_record_depends_on_the_inputs_alone(project):
    run(tracked=False)
    first = (PATHS.report / "registration.json").read_bytes()
    assert json.loads((PATHS.report / "metrics.json").read_text()) == {"gates": 1, "gates_passed": 1, "passed": 1}
    (project / "dvc.lock").write_text("stages: {other: {}}\n")
    run(tracked=False)
    assert (PATHS.report / "registration.json").read_bytes() == first
    assert json.loads(first)["md5"]["judge"] is None, "a judge behind an API has no weights here"


def test_a_gate_holds_at_its_bound_and_fails_past_it():
    check = lambda low, high: [
        gate["passed"] for gate in register.check_gates({"a": 0.5}, at_least={"a": low}, at_most={"a": high})
    ]
    assert check(0.5, 0.5) == [True, True]
    assert check(0.51, 0.49) == [False, False]


def test_a_gate_on_an_unknown_metric_names_the_near_one(project):
    with pytest.raises(UserError, match=r"at_least\.win_rate\.juge\.low.*did you mean 'win_rate\.judge\.low'"):
        run(tracked=False, at_least={"win_rate.juge.low": 0.5})


def test_a_missing_model_is_named(project):
    shutil.rmtree(PATHS.sft)
    with pytest.raises(UserError, match=r"models/sft: no such file or folder.*dvc pull"):
        run(tracked=False)


def test_digests_are_dvcs_own(tmp_path):
    """`dvc add` writes the same md5 for a file and for a folder with folders in it."""
    shutil.copytree(Path(__file__).parent.parent / "recipes", tmp_path / "data", dirs_exist_ok=True)
    (tmp_path / "data/deep/er").mkdir(parents=True)
    (tmp_path / "data/deep/er/é.txt").write_text("ünï\r\n")
    (tmp_path / "data/deep.txt").write_bytes(bytes(range(256)))
    dvc = lambda *words: subprocess.run(
        [sys.executable, "-m", "dvc", *words], cwd=tmp_path, check=True, capture_output=True
    )
    dvc("init", "--no-scm", "-q")
    dvc("config", "core.analytics", "false")
    shutil.copy(tmp_path / "data/deep.txt", tmp_path / "file.bin")
    dvc("add", "-q", "data", "file.bin")
    assert lineage.md5_of(tmp_path / "data") in (tmp_path / "data.dvc").read_text()
    assert lineage.md5_of(tmp_path / "file.bin") in (tmp_path / "file.bin.dvc").read_text()


def test_a_version_carries_every_module_that_loads_it():
    from test_dvc_yaml import ROOT, imports

    from tasks.tracking_models import CODE

    assert imports(ROOT, "tasks.servable") == {f"{name}/{module}" for name, of in CODE.items() for module in of}


@pytest.mark.slow
def test_a_version_is_asked_by_mlflows_own_commands(project):
    """`mlflow models predict` on a file, `mlflow models serve` by a request on loopback."""
    run(tracked=True)
    # MLflow starts uvicorn by its name.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{project}/home/mlflow/mlflow.db", "PATH": path}
    mlflow = [sys.executable, "-m", "mlflow", "models"]
    version = ["-m", "models:/rankwise-policy@champion", "--env-manager", "local"]
    (project / "in.csv").write_text("prompt\nThe film\nA\n")
    predict = [*mlflow, "predict", *version, "-i", "in.csv", "-t", "csv", "-o", "out.json"]
    subprocess.run(predict, env=environment, check=True, capture_output=True, timeout=240)
    assert len(json.loads((project / "out.json").read_text())["predictions"]) == 2
    port = free_port()
    with open(project / "serve.log", "w") as log:
        serve = [*mlflow, "serve", *version, "--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(serve, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        body = {"inputs": {"prompt": ["The film"]}, "params": {"max_new_tokens": 3}}
        assert len(answer(f"http://127.0.0.1:{port}/invocations", body, server)["predictions"]) == 1
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.mark.slow
def test_behind_a_password_everything_works_and_a_wrong_one_is_told(project, monkeypatch):
    """A server with basic authentication that keeps artifacts itself: stages, registry, weights, a wrong password."""
    pytest.importorskip("flask_wtf", reason="the extra mlflow[auth] is not installed")
    secret, port = "a-long-password-1", free_port()
    (project / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{project}/auth.db\nadmin_username = admin\n"
        f"admin_password = {secret}\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    settings = {
        "MLFLOW_AUTH_CONFIG_PATH": f"{project}/auth.ini",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "x",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{project}/server.db", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--artifacts-destination", f"{project}/kept"]
    with open(project / "server.log", "w") as log:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True)
    try:
        answer(f"http://127.0.0.1:{port}/health", None, server)
        monkeypatch.setenv("RANKWISE_TRACKING", "on")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        (project / "params.yaml").write_text("register: {name: rankwise-policy}\n")

        def register_and_fetch(password: str, folder: str) -> tuple[bool, subprocess.CompletedProcess]:
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
            with tracking.stage_run("register", {}) as tracker:
                register.run(params(log_weights=True), PATHS, Stage("register", tracker=tracker, report=PATHS.report))
                reached = tracker.run_id is not None
            fetch = [sys.executable, "-m", "tasks.weights", "champion", folder]
            return reached, subprocess.run(fetch, capture_output=True, text=True, timeout=240)

        reached, told = register_and_fetch("wrong-password", "never")
        assert not reached and told.returncode == 2 and "set MLFLOW_TRACKING_USERNAME" in told.stderr
        assert "Traceback" not in told.stderr and secret not in told.stderr
        reached, told = register_and_fetch(secret, "one")
        assert reached and told.returncode == 0, told.stderr
        md5 = lineage.md5_of(PATHS.policy)
        shutil.rmtree(PATHS.policy)
        fetch = [sys.executable, "-m", "tasks.weights", "1", "two"]
        subprocess.run(fetch, check=True, timeout=240)
        assert lineage.md5_of(project / "one") == lineage.md5_of(project / "two") == md5
        assert list((project / "kept").rglob("model.safetensors"))
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answer(url: str, body: dict | None, server: subprocess.Popen) -> dict:
    """What a server answers, once it does."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    deadline = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                text = reply.read()
                return {} if body is None else json.loads(text)
        except (urllib.error.URLError, OSError):
            assert server.poll() is None and time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.3)
