"""Registered models in MLflow: one version for each set of weights, with its signature and where it came from.

The version is loaded by tasks.servable: no pickled object is in it. Unless a copy was asked for, the weights stay in
DVC and the version holds a pointer to them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from tasks.tracking_notes import intervals, number_table

ROOT = Path(__file__).resolve().parent.parent
# What tasks.servable imports, and no more: a server takes files one by one, and asks for the password each time.
CODE = {
    "rankwise": ("__init__.py", "json_text.py", "rendering.py", "types.py"),
    "tasks": ("__init__.py", "lineage.py", "params.py", "servable.py", "tracking.py", "weights.py", "yaml_text.py"),
}
REQUIREMENTS = ("torch", "transformers", "safetensors", "numpy", "pandas", "pyyaml")

DESCRIPTION = (
    "Policies aligned by rankwise, one version for each set of weights. "
    "`mlflow.pyfunc.load_model('models:/{name}@champion').predict(pandas.DataFrame({{'prompt': ['The film']}}))`"
)

BELOW_PROMOTION = "\n\n#### Registered\n\n"  # between what a promotion says of a version and what registering said

# Written out, not inferred: inferring loads the model and asks for packages that it does not need.
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "prompt")]),
    outputs=Schema([ColSpec("string", "completion")]),
    params=ParamSchema(
        [
            ParamSpec("max_new_tokens", "long", 64),
            ParamSpec("temperature", "double", 0.0),  # 0: the likeliest token each time
            ParamSpec("seed", "long", 0),
        ]
    ),
)


def register(
    client: MlflowClient,
    run_id: str,
    *,
    folder: str,
    name: str,
    md5: str,
    tags: dict[str, str],
    gates: list[str],
    metrics: dict[str, float],
    passed: bool,
    copy_weights: bool,
) -> dict[str, Any]:
    """Make sure that a version for these weights exists, carries these tags and has the alias that it deserves.

    md5 is the weights' DVC md5, the identity of a version. The first version that passes its gates becomes the
    champion, later ones the challenger; tasks.promote replaces a champion. Returns version, alias and
    whether the version is new.
    """
    known = _version_of(client, name, md5)
    found = known or _log(run_id, folder, name, md5, tags, copy_weights)
    own = {"policy_path": folder, "policy_md5": md5, "gates": "passed" if passed else "failed"}
    for key, value in {**tags, **own}.items():
        client.set_model_version_tag(name, found.version, key, value)
    text = with_promotion(_describe(gates, metrics, passed), promotion_in(found.description or ""))
    client.update_model_version(name, found.version, text)
    client.update_registered_model(name, DESCRIPTION.format(name=name))
    alias = _give_alias(client, name, found.version) if passed else _take_challenger(client, name, found.version)
    return {"version": str(found.version), "alias": alias, "new": known is None}


def _describe(gates: list[str], metrics: dict[str, float], passed: bool) -> str:
    # The list of versions shows the first line, unrendered.
    verdict = "All gates passed." if passed else "A gate failed: no alias."
    shown = "\n".join(f"- {gate}" for gate in gates)
    return f"{verdict}\n\n{shown}\n\n{number_table('evaluation', intervals(metrics))}"


def with_promotion(description: str, text: str) -> str:
    """A version's description with what a promotion says of it at its head, in place of what an earlier one said."""
    rest = description.rpartition(BELOW_PROMOTION)[2]
    return f"{text}{BELOW_PROMOTION}{rest}" if text else rest


def promotion_in(description: str) -> str:
    """What a promotion has said in a description; "" where none has."""
    return description.rpartition(BELOW_PROMOTION)[0]


def _version_of(client: MlflowClient, name: str, md5: str) -> Any | None:
    try:
        versions = client.search_model_versions(f"name = '{name}'")
    except MlflowException:
        return None
    return next(
        (one for one in versions if client.get_model_version(name, one.version).tags.get("policy_md5") == md5), None
    )


def _log(run_id: str, folder: str, name: str, md5: str, tags: dict[str, str], copy_weights: bool) -> Any:
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "policy"
        for package, modules in CODE.items():
            (Path(scratch) / package).mkdir()
            for module in modules:
                shutil.copy(ROOT / package / module, Path(scratch) / package / module)
        if copy_weights:
            shutil.copytree(folder, data)
        else:
            data.mkdir()
            pointer = {"path": folder, "md5": md5}
            pointer |= {name: tags.get(f"git.{name}", "") for name in ("commit", "branch")}
            (data / "pointer.json").write_text(json.dumps(pointer) + "\n", encoding="utf-8")
        with mlflow.start_run(run_id=run_id), warnings.catch_warnings(), patient():
            warnings.simplefilter("ignore")  # it asks for an example, and would load the model for it
            logged = mlflow.pyfunc.log_model(
                name="policy",
                loader_module="tasks.servable",
                data_path=str(data),
                code_paths=[str(Path(scratch) / package) for package in CODE],
                signature=SIGNATURE,
                pip_requirements=[f"{package}=={version(package)}" for package in REQUIREMENTS],
                registered_model_name=name,
                metadata={"policy_md5": md5},
            )
    return mlflow.MlflowClient().get_model_version(name, str(logged.registered_model_version))


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Give a server time for a file: it answers when it has stored the whole, and weights are large."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ[name] = "3600"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _give_alias(client: MlflowClient, name: str, number: str) -> str:
    aliases = client.get_registered_model(name).aliases
    if str(aliases.get("champion")) == str(number):
        return "champion"
    alias = "challenger" if "champion" in aliases else "champion"
    client.set_registered_model_alias(name, alias, str(number))
    return alias


def _take_challenger(client: MlflowClient, name: str, number: str) -> str:
    aliases = client.get_registered_model(name).aliases
    if str(aliases.get("challenger")) == str(number):
        client.delete_registered_model_alias(name, "challenger")
    return "champion" if str(aliases.get("champion")) == str(number) else ""
