"""Laws of what code of ours may do with what others wrote: nothing is unpickled, evaluated or handed to a shell.

What such data leave behind when stages read them is in test_hostile_files.py; docs/security.md has the threats.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("rankwise", "tasks", "flows", "benchmarks", "infra", "recipes")

MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "breakpoint"),
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load"),
    *("pd.read_pickle", "pandas.read_pickle", "np.fromregex"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("tempfile.mktemp", "tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive"),
    *("mlflow.pyfunc.load_model", "mlflow.sklearn.load_model", "mlflow.pytorch.load_model"),
}
METHODS = {"to_pickle", "read_pickle", "extractall"}
KEYWORDS = {"shell": {True}, "allow_pickle": {True}, "verify": {False}, "weights_only": {False}}
CLASSES = {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AutoModelForSequenceClassification"}


def faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what is not to be there) for each place of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, one.name) for one in node.names if one.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, fault) for fault in of_call(node))


def of_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {word.arg: word.value for word in call.keywords}
    if name in CALLS:
        yield name
    if isinstance(call.func, ast.Attribute) and call.func.attr in METHODS:
        yield call.func.attr
    for word, bad in KEYWORDS.items():
        if isinstance(value := given.get(word), ast.Constant) and value.value in bad:
            yield f"{word}={value.value}"
    if "trust_remote_code" in given and ast.unparse(given["trust_remote_code"]) not in (
        "remote_code_allowed()",
        "False",
    ):
        yield "trust_remote_code"
    owner, _, method = name.rpartition(".")
    if method == "from_pretrained" and (owner in CLASSES or owner == "auto"):
        # The library's default asks at a terminal whether code that comes with a model may run.
        if "trust_remote_code" not in given:
            yield f"{name} without trust_remote_code"
        if owner not in ("AutoConfig", "AutoTokenizer") and ast.unparse(given.get("use_safetensors", call)) != "True":
            yield f"{name} without use_safetensors"


def modules() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_module_unpickles_evaluates_or_hands_data_to_a_shell():
    found = {str(path.relative_to(ROOT)): list(faults(ast.parse(path.read_text()))) for path in modules()}
    assert len(found) > 150
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import joblib.numpy_pickle",
        "from pickle import loads",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "tempfile.mktemp()",
        "frame.to_pickle(path)",
        "load_dataset(name, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(folder)",
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)",
        "httpx.get(url, verify=False)",
        "tarfile.open(path).extractall()",
    ],
)
def test_each_of_these_would_be_found(text):
    assert list(faults(ast.parse(text)))


def test_every_server_that_a_command_starts_for_one_person_listens_on_this_machine_alone(tmp_path, monkeypatch):
    """It asks for no password; servers of a team are another matter (test_stack.py)."""
    from flows import server
    from rankwise.serving import VLLM
    from tasks.tracking_ui import ui_command

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql:///mlflow")
    asked: list[list[str]] = []
    monkeypatch.setattr(server, "HOME", tmp_path)
    monkeypatch.setattr(server.subprocess, "Popen", lambda words, **_: asked.append(words))
    server.Server(4200, lean=False)
    for words in (VLLM.split(), ui_command(5000)[0], *asked):
        assert words[words.index("--host") + 1] == "127.0.0.1"
    assert len(asked) == 1
