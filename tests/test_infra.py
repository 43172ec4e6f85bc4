"""Laws of what is in infra: its files are what their tools want, hold no secret, and say no for a reason."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import yaml

from infra.stack import __main__ as command
from infra.stack import postgres, services, settings
from infra.stack.databases import NAMES
from rankwise.types import UserError

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
BIN = Path(sys.executable).parent
COMPOSE = INFRA / "compose.yaml"
POOLS = INFRA / "pools"


def run(*words: object, **more) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120, **more)


def text_files() -> list[Path]:
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "infra", cwd=ROOT).stdout.split()
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


# What its tools say


@pytest.mark.parametrize("file", sorted(INFRA.glob("docker/Dockerfile*")), ids=lambda file: file.name)
def test_a_dockerfile_has_no_fault_that_hadolint_knows(file):
    told = run(BIN / "hadolint", file)
    assert told.returncode == 0, told.stdout + told.stderr


def test_compose_keeps_its_schema():
    told = run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)
    assert told.returncode == 0, told.stdout + told.stderr


@pytest.fixture(scope="module")
def manifests(tmp_path_factory) -> list[dict]:
    """What kustomize makes of infra/kubernetes/base; without kubectl, the files as they are."""
    base = INFRA / "kubernetes" / "base"
    if shutil.which("kubectl"):
        made = run("kubectl", "kustomize", base)
        assert made.returncode == 0, made.stderr
        return list(yaml.safe_load_all(made.stdout))
    named = yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
    return [one for name in named for one in yaml.safe_load_all((base / name).read_text())]


def strictly(manifest: dict) -> None:
    """Raise at what Kubernetes' own schema does not know."""
    import kubernetes_validate

    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_manifests_are_what_kubernetes_knows(manifests):
    for manifest in manifests:
        strictly(manifest)
    assert {manifest["kind"] for manifest in manifests} >= {"Deployment", "StatefulSet", "NetworkPolicy", "Role", "Job"}


def test_a_manifest_with_a_misspelt_key_is_found():
    with pytest.raises(Exception, match="readinesProbe"):
        strictly(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "a"},
                "spec": {"containers": [{"name": "a", "readinesProbe": {}}]},
            }
        )


def pods(manifests: list[dict]) -> dict[str, dict]:
    return {
        f"{one['kind']}/{one['metadata']['name']}": one["spec"]["template"]["spec"]
        for one in manifests
        if one["kind"] in ("Deployment", "StatefulSet", "Job")
    }


def test_no_pod_has_a_right_that_it_does_not_need(manifests):
    """The profile `restricted`, which the namespace enforces; bounded memory; Kubernetes' API for the worker alone."""
    (namespace,) = (one for one in manifests if one["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    rendered = {"run": job()["spec"]["template"]["spec"]}
    for name, pod in {**pods(manifests), **rendered}.items():
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] >= 999, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] == (name == "Deployment/worker"), name
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            closed = container["securityContext"]
            assert closed["allowPrivilegeEscalation"] is False and closed["capabilities"] == {"drop": ["ALL"]}, name
            assert {"memory"} <= container["resources"]["limits"].keys() and container["resources"]["requests"], name


def test_servers_are_asked_whether_they_are_well(manifests):
    for name, pod in pods(manifests).items():
        for container in pod["containers"]:
            assert name.startswith("Job/") or {"startupProbe", "livenessProbe"} <= container.keys(), name


def test_what_a_manifest_names_is_there(manifests):
    there = {(one["kind"], one["metadata"]["name"]) for one in manifests}
    text = yaml.safe_dump_all([*manifests, job()])
    assert {("ConfigMap", name) for name in re.findall(r"configMapRef:\s+name: ([\w-]+)", text)} <= there
    assert {("PersistentVolumeClaim", name) for name in re.findall(r"claimName: ([\w-]+)", text)} <= there
    assert {("ServiceAccount", name) for name in re.findall(r"serviceAccountName: ([\w-]+)", text)} <= there
    assert set(re.findall(r"secretKeyRef:\s+key: \w+\s+name: ([\w-]+)", text)) == {"rankwise"}
    keys = set(re.findall(r"secretKeyRef:\s+key: (\w+)", text))
    assert keys <= {*settings.SECRETS, "PREFECT_API_AUTH_STRING"}


def test_secrets_come_to_pods_by_reference(manifests):
    secret = re.compile(r"(?!PREFECT_INTEGRATIONS_).*(PASSWORD|SECRET|_KEY|AUTH_STRING)$")
    for name, pod in {**pods(manifests), "run": job()["spec"]["template"]["spec"]}.items():
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            given = {one["name"] for one in container["env"] if secret.match(one["name"]) and "value" in one}
            assert not given, name
    assert "Secret" not in {one["kind"] for one in manifests}


def test_a_training_job_is_what_kubeflow_trainer_knows():
    """Its own models drop what they do not know, so nothing may be lost on the way through them."""
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    given = yaml.safe_load((INFRA / "kubernetes" / "train_job.yaml").read_text())
    read = TrainerV1alpha1TrainJob.from_dict(given).to_dict()
    assert within(given, read) == []


def within(given: object, read: object, path: str = "") -> list[str]:
    """Paths of what is given and not read."""
    if isinstance(given, dict) and isinstance(read, dict):
        return [lost for key in given for lost in within(given[key], read.get(key), f"{path}/{key}")]
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        return [lost for at, (a, b) in enumerate(zip(given, read)) for lost in within(a, b, f"{path}/{at}")]
    return [] if given == read else [path]


class Blocks:
    """Prefect's client as far as templates ask it: Secret blocks that hold their own name."""

    async def read_block_document_by_name(self, name: str, block_type_slug: str):
        from types import SimpleNamespace

        return SimpleNamespace(data={"value": f"value of {name}"}, block_type=SimpleNamespace(slug=block_type_slug))


def configuration(kind, file: str, **values):
    """The job of a flow run, by the worker's own code."""
    from prefect.client.schemas.objects import FlowRun

    template = json.loads((POOLS / file).read_text())
    made = asyncio.run(kind.from_template_and_values(template, values, client=Blocks()))
    made.prepare_for_flow_run(FlowRun(id=uuid.UUID(int=7), name="a-run", flow_id=uuid.UUID(int=8)))
    return made


def job(**values) -> dict:
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    manifest = configuration(KubernetesWorkerJobConfiguration, "kubernetes.json", **values).job_manifest
    # Prefect wants these two in the pod, where Kubernetes does not know them and looks past them.
    pod = manifest["spec"]["template"]["spec"]
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    return manifest


def test_a_run_of_the_kubernetes_pool_is_a_job_with_gpus_and_volumes():
    made = job(gpus=2, memory="64Gi")
    strictly({**made, "metadata": {**made["metadata"], "name": "a-run"}})
    (container,) = made["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 2}
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert {one["name"] for one in container["env"] if "valueFrom" in one} == {
        "MLFLOW_TRACKING_PASSWORD",
        "AWS_SECRET_ACCESS_KEY",
    }


def test_the_worker_gives_runs_the_secrets_name_and_watches_its_namespace_alone(manifests, monkeypatch):
    from prefect_kubernetes.settings import KubernetesSettings

    (container,) = pods(manifests)["Deployment/worker"]["containers"]
    for one in container["env"]:
        if one["name"].startswith("PREFECT_INTEGRATIONS_"):
            monkeypatch.setenv(one["name"], one["value"])
    read = KubernetesSettings()
    assert read.worker.api_auth_string_secret_name == "rankwise"
    assert read.worker.api_auth_string_secret_key == "PREFECT_API_AUTH_STRING"
    assert set(read.observer.namespaces) == {"rankwise"}


def test_a_run_of_the_docker_pool_is_a_container_that_docker_takes():
    from docker.types import HostConfig
    from prefect_docker.worker import DockerWorkerJobConfiguration

    made = configuration(DockerWorkerJobConfiguration, "docker.json", gpus=2, env={"OF_THE_RUN": "1"})
    more = dict(made.container_create_kwargs)
    host = HostConfig(version="1.44", binds=made.volumes, mem_limit=made.mem_limit, **more)
    assert host["DeviceRequests"][0]["Count"] == 2 and host["CapDrop"] == ["ALL"]
    assert made.env["MLFLOW_TRACKING_PASSWORD"] == "value of mlflow-password" and made.env["OF_THE_RUN"] == "1"


@pytest.mark.parametrize("file", sorted(INFRA.glob("accelerate/*.yaml")), ids=lambda file: file.name)
def test_accelerate_reads_its_configurations(file):
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(file))
    given = yaml.safe_load(file.read_text())
    assert read.distributed_type.value == given["distributed_type"] and read.num_processes == given["num_processes"]
    assert read.fsdp_config == given.get("fsdp_config", {})


def test_prefect_reads_every_deployment():
    from prefect.cli.deploy._models import PrefectYamlModel

    given = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    read = PrefectYamlModel.model_validate(given)
    assert [one.name for one in read.deployments] == [one["name"] for one in given["deployments"]]
    assert {one.work_pool.name for one in read.deployments} == {settings.POOL}


def test_the_stack_and_the_flows_mean_the_same_by_a_name():
    from flows import automations, stages

    assert (settings.GPU_LIMIT, settings.HEARTBEAT_S) == (stages.GPU_LIMIT, automations.HEARTBEAT_S)


# Secrets and settings


def variables_of_compose() -> set[str]:
    text = COMPOSE.read_text()
    passed_on = {
        name
        for service in yaml.safe_load(text)["services"].values()
        for name, value in service.get("environment", {}).items()
        if value is None
    }
    return set(re.findall(r"\$\{([A-Z0-9_]+)", text)) | passed_on


def test_compose_and_the_example_name_the_same_variables():
    # PostgreSQL has no port outside its network under compose, and make up starts no vLLM.
    lines = (INFRA / "env.example").read_text().splitlines()
    told = {found[1] for line in lines if (found := re.match(r"(?:# )?([A-Z0-9_]+)=", line)) and found[1] != "NAME"}
    assert variables_of_compose() == told - {"RANKWISE_POSTGRES_PORT"}


def test_every_variable_that_has_to_be_secret_is_wanted_by_compose():
    text = COMPOSE.read_text()
    for name in settings.SECRETS:
        assert set(re.findall(rf"\$\{{{name}(:\?|[^A-Z_]..)", text)) == {":?"}, name


def test_compose_publishes_no_port_beyond_the_address_asked_for():
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    published = {name: service.get("ports", []) for name, service in services.items()}
    assert published["postgres"] == []
    assert all(port.startswith("${RANKWISE_BIND:-127.0.0.1}:") for ports in published.values() for port in ports)


def test_no_password_stands_in_a_file():
    """What is named like a secret is empty, a variable, or a reference."""
    named = re.compile(
        r"(?i)^[ \-#\"{]*(?:name: )?(\w*(?:password|secret|_token|api_key|secret_key|auth_string))\"?\s*[:=] *(.+)$"
    )
    reference = re.compile(r"[\"']?(admin:)?(\$\{[A-Z_]+[:}]|\{\{ prefect\.blocks\.secret\.)")
    literal = [
        f"{path.name}: {line}"
        for path in text_files()
        if path.suffix in (".yaml", ".json", ".ini", ".example", "")
        for line in path.read_text().splitlines()
        if (found := named.match(line)) and not reference.match(found[2])
    ]
    assert literal == []


def test_images_have_versions():
    for path in (COMPOSE, INFRA / "docker" / "Dockerfile"):
        named = re.findall(r"^\s*(?:image:|FROM) ([\w./-]+)(?::(\S+))?", path.read_text(), re.M)
        stages = {"base", "torch-"}
        assert [name for name, tag in named if name not in stages and tag in ("", "latest")] == []


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with the example and nothing else of a stack."""
    (tmp_path / "infra").mkdir()
    shutil.copy(INFRA / "env.example", tmp_path / "infra")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("RANKWISE_")]:
        monkeypatch.delenv(name)
    return tmp_path


def test_passwords_are_written_once_random_and_for_this_user_alone(project):
    assert settings.write_once() and not settings.write_once()
    made = settings.parse(settings.FILE)
    assert stat.S_IMODE(settings.FILE.stat().st_mode) == 0o600
    values = [made[name] for name in settings.SECRETS]
    assert len(set(values)) == len(settings.SECRETS) and min(map(len, values)) >= 32
    assert made.keys() == settings.parse(settings.EXAMPLE).keys()
    assert settings.read().prefect_password == made["RANKWISE_PREFECT_PASSWORD"]


def test_the_environment_wins_over_the_file(project, monkeypatch):
    settings.write_once()
    monkeypatch.setenv("RANKWISE_PREFECT_PORT", "4300")
    monkeypatch.setenv("RANKWISE_BIND", "0.0.0.0")
    monkeypatch.setenv("RANKWISE_JUDGE_URL", "http://judge:8000/v1")
    read = settings.read()
    assert read.url("prefect") == "http://127.0.0.1:4300" and read.address("postgres").startswith("127.0.0.1:")
    assert read.for_worker == {"RANKWISE_JUDGE_URL": "http://judge:8000/v1"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("RANKWISE_S3_SECRET=", "RANKWISE_S3_SECRET is empty"),
        ("RANKWISE_MLFLOW_PASSWORD=short", "fewer than 12"),
        ("RANKWISE_S3_SECRET=a,b", "comma"),
        ("RANKWISE_PREFECT_PORT=99999", "from 1 to 65535"),
        ("RANKWISE_PREFECT_PROT=4200", "RANKWISE_PREFECT_PROT is unknown"),
        ("export RANKWISE_RUNS=1", "no NAME=value"),
    ],
)
def test_a_setting_that_cannot_be_is_named_and_nothing_starts(project, capsys, line, said):
    settings.write_once()
    with open(settings.FILE, "a") as file:
        file.write(f"{line}\n")
    assert command.main(["status"]) == 2
    told = capsys.readouterr()
    assert said in told.err and told.out == ""


def test_a_machine_without_postgresql_is_told_its_package(monkeypatch):
    monkeypatch.setattr(postgres.glob, "glob", lambda _: [])
    monkeypatch.setattr(postgres.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="apt-get install postgresql"):
        postgres.program("initdb")


def test_a_service_comes_with_what_it_needs_and_nothing_else(project):
    settings.write_once()
    known = services.services(settings.read())
    assert [one.name for one in command._wanted(known, ["mlflow"])] == ["postgres", "s3", "mlflow"]
    assert [one.name for one in command._wanted(known, ["worker"])] == ["postgres", "prefect", "worker"]
    with pytest.raises(UserError, match="'minio'; there are postgres, s3, prefect, mlflow, worker"):
        command._wanted(known, ["minio"])


def test_exports_survive_a_shell(project, monkeypatch):
    settings.write_once()
    monkeypatch.setenv("RANKWISE_PREFECT_PASSWORD", "it's $HOME; `x` \\ %")
    told = run(sys.executable, "-m", "infra.stack", "environment", env={**os.environ, "PYTHONPATH": str(ROOT)})
    said = run("sh", "-c", f'{told.stdout}\nprintf %s "$PREFECT_API_AUTH_STRING"', env={"PATH": os.environ["PATH"]})
    assert said.stdout == "admin:it's $HOME; `x` \\ %"


def test_databases_have_names_that_need_no_quotes():
    assert all(re.fullmatch(r"[a-z_]+", name) for name in NAMES)
