"""Laws of the stack of `make up`, on real servers: who gets in, what lands where, what a kill and a stop leave."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import stat
import sys
import textwrap
import urllib.error
import urllib.request

import psutil
import pytest
import yaml
from stacks import Stack

from tasks import lineage
from tasks.recipe import STAGES

pytestmark = pytest.mark.slow

SERVICES = ("postgres", "s3", "prefect", "mlflow", "worker")


def status_of(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def python(stack: Stack, text: str) -> str:
    return stack.run(sys.executable, "-c", textwrap.dedent(text))


def experiments(stack: Stack) -> set[str]:
    """Names that MLflow has, asked without its client, which takes seconds to import."""
    asked = stack.environment()
    login = base64.b64encode(f"admin:{asked['MLFLOW_TRACKING_PASSWORD']}".encode()).decode()
    url = f"{asked['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/search?max_results=100"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Basic {login}"})) as reply:
        return {one["name"] for one in json.load(reply)["experiments"]}


def test_up_ends_with_a_table_of_services_that_are_well(stack):
    table = stack.said[stack.said.index("service ") :].splitlines()[1 : len(SERVICES) + 1]
    rows = {line.split()[0]: line.split() for line in table}
    assert list(rows) == list(SERVICES)
    assert all(row[-2] == "started" and (stack.root / row[-1]).is_file() for row in rows.values())
    assert stack.command("status").returncode == 0


def test_passwords_are_random_and_for_this_user_alone(stack):
    assert stat.S_IMODE((stack.root / "infra/.env").stat().st_mode) == 0o600
    assert len(set(stack.secrets())) == 6 and min(map(len, stack.secrets())) >= 32


def test_nobody_gets_in_without_the_password(stack):
    asked = stack.environment()
    prefect, mlflow, s3 = (asked[name] for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"))
    guess = {"Authorization": "Basic YWRtaW46YWRtaW4="}  # admin:admin
    for headers in ({}, guess):
        assert status_of(f"{prefect}/admin/version", **headers) == 401
        assert status_of(f"{mlflow}/api/2.0/mlflow/experiments/get?experiment_id=0", **headers) == 401
        assert status_of(f"{mlflow}/api/2.0/mlflow-artifacts/artifacts", **headers) == 401
        assert status_of(f"{s3}/dvc", **headers) in (400, 401, 403)
    said = python(
        stack,
        """
        import boto3, botocore.exceptions
        try:
            boto3.client("s3", aws_access_key_id="rankwise", aws_secret_access_key="guess").list_buckets()
        except botocore.exceptions.ClientError as error:
            print(error.response["Error"]["Code"])
        print([one["Name"] for one in boto3.client("s3").list_buckets()["Buckets"]])
        """,
    )
    assert said.split("\n")[:2] == ["SignatureDoesNotMatch", "['dvc', 'mlflow']"]


def test_postgresql_asks_every_connection_for_the_password(stack):
    import psycopg2

    for password in (None, "guess"):
        with pytest.raises(psycopg2.OperationalError, match=r"no password supplied|authentication failed"):
            psycopg2.connect(
                host="127.0.0.1", port=stack.ports["RANKWISE_POSTGRES_PORT"], user="rankwise", password=password
            )


def test_a_flow_run_is_kept_with_the_deployments_of_prefect_yaml(stack):
    said = python(
        stack,
        """
        from prefect import flow, get_client
        @flow
        def hello(): return 1
        hello()
        with get_client(sync_client=True) as client:
            print("runs", [run.state.name for run in client.read_flow_runs()])
            print("deployments", sorted(one.name for one in client.read_deployments()))
            print("gpus", client.read_global_concurrency_limit_by_name("rankwise-gpu").limit)
            print("automations", [one.name for one in client.read_automations() if one.enabled])
        """,
    )
    told = dict(line.split(" ", 1) for line in said.splitlines() if line.split(" ", 1)[0] in said)
    named = yaml.safe_load((stack.root / "prefect.yaml").read_text())["deployments"]
    assert "'Completed'" in told["runs"]
    assert told["deployments"] == str(sorted(one["name"] for one in named))
    assert told["gpus"] == "1" and "a run that died" in told["automations"]


def test_an_artifact_of_a_run_lands_in_the_store_through_mlflow(stack):
    said = python(
        stack,
        """
        import mlflow, os
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]  # the server holds the store's key, a client needs none
        mlflow.set_experiment("stack")
        with mlflow.start_run() as run:
            mlflow.log_metric("loss", 0.25)
            mlflow.log_text("kept", "note.txt")
        print("run", run.info.run_id, mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/note.txt"))
        """,
    )
    run = next(line.split()[1] for line in said.splitlines() if line.startswith("run "))
    (note,) = (stack.home / "s3" / "mlflow").rglob(f"*{run}/artifacts/note.txt")
    assert note.read_text() == "kept"


def test_a_large_file_comes_back_from_dvcs_remote(stack):
    """Above 50 MB uploads come in parts, whose checksums S3 clients would hold against the whole file."""
    sample = stack.root / "sample.bin"
    sample.write_bytes(os.urandom(60_000_000))
    before = sample.read_bytes()
    stack.run("dvc", "remote", "add", "--local", "--default", "stack", "s3://dvc")
    stack.run("dvc", "add", "--quiet", "sample.bin")
    stack.run("dvc", "push", "--quiet", "sample.bin.dvc")
    sample.unlink()
    shutil.rmtree(stack.root / ".dvc" / "cache" / "files")
    stack.run("dvc", "pull", "--quiet", "sample.bin.dvc")
    assert sample.read_bytes() == before


def test_a_schedule_fires_and_its_run_leaves_a_model_to_review_and_data_for_others(stack):
    """Deployment, schedule, worker, stages, MLflow with a password, S3: all that a night needs, and nobody watching."""
    described = stack.root / "prefect.yaml"
    described.write_text(described.read_text().replace('cron: "0 2 * * *"', 'cron: "* * * * *"'))
    stack.run("prefect", "--no-prompt", "deploy", "--name", "nightly")
    told = python(
        stack,
        """
        import time
        from prefect import get_client
        with get_client(sync_client=True) as client:
            nightly = client.read_deployment_by_name("align/nightly")
            ours, deadline = [], time.monotonic() + 380
            while not (ours and ours[0].state.is_final()) and time.monotonic() < deadline:
                time.sleep(2)
                ran = [run for run in client.read_flow_runs() if run.deployment_id == nightly.id and run.start_time]
                ours = [run for run in ran if not run.state.is_cancelled()]  # CANCEL_NEW drops the next minutes' runs
            for schedule in nightly.schedules:
                client.delete_deployment_schedule(nightly.id, schedule.id)
            print("run", *([ours[0].state.name, ours[0].name] if ours else ["none", ""]), sep="|")
        """,
    )
    _, state, name = next(line for line in told.splitlines() if line.startswith("run|")).split("|")
    worker = (stack.home / "logs" / "worker.log").read_text()
    assert state == "Completed" and name.endswith(f", {len(STAGES)} ran"), worker[-4000:]

    versions = python(
        stack,
        """
        import mlflow
        for one in mlflow.MlflowClient().search_model_versions("name = 'rankwise-policy'"):
            print("version", one.version, one.tags["policy_md5"])
        """,
    )
    [(number, md5)] = [line.split()[1:] for line in versions.splitlines() if line.startswith("version ")]
    assert number == "1"

    # Somebody else, who has the repository and the remote, and computes nothing.
    [branch] = stack.run("git", "branch", "--list", "runs/*-nightly-*").split()
    stack.run("git", "clone", "-q", "-b", branch, str(stack.root), str(stack.folder / "other"))
    for words in (["remote", "add", "--local", "--default", "s", "s3://dvc"], ["pull", "--quiet", "models/policy"]):
        stack.run("dvc", "--cd", str(stack.folder / "other"), *words)
    assert lineage.md5_of(stack.folder / "other" / "models" / "policy") == md5


def test_no_password_is_on_a_command_line_or_in_a_log(stack):
    with stack.watching():
        stack.command("status")
    assert any("rclone" in line for line in stack.seen) and any("deploy" in line for line in stack.seen)
    logs = [path.read_text(errors="replace") for path in (stack.home / "logs").iterdir()]
    assert [text for text in (*stack.seen, *logs) for secret in stack.secrets() if secret in text] == []


def test_only_loopback_listens(stack):
    ours = {process.pid for family in stack.processes().values() for process in family}
    ports = set(map(int, stack.ports.values()))
    open_to = [
        one.laddr
        for one in psutil.net_connections("inet")
        if one.status == psutil.CONN_LISTEN and (one.pid in ours or one.laddr.port in ports)
    ]
    assert ports <= {address.port for address in open_to}
    assert {address.ip for address in open_to} == {"127.0.0.1"}


def test_a_killed_service_is_started_again_and_the_others_are_left(stack):
    def leaders() -> dict[str, int]:
        return {name: json.loads((stack.home / "run" / f"{name}.json").read_text())["pid"] for name in SERVICES}

    before = leaders()
    for name in ("postgres", "mlflow"):
        os.kill(before[name], signal.SIGKILL)
    told = stack.command("status")
    assert told.returncode == 1 and told.stdout.count("   down   ") == 2
    again = stack.command("up")
    assert again.returncode == 0, again.stdout + again.stderr
    after = leaders()
    assert {name for name in SERVICES if before[name] != after[name]} == {"postgres", "mlflow"}
    assert {"Default", "stack"} <= experiments(stack)


def test_down_leaves_no_process_and_all_data(stack):
    done = stack.command("down")
    assert done.returncode == 0 and "PostgreSQL" in done.stdout
    assert stack.processes() == {}
    ports = set(map(int, stack.ports.values()))
    assert [one for one in psutil.net_connections("inet") if one.status == "LISTEN" and one.laddr.port in ports] == []
    assert (stack.home / "postgres" / "PG_VERSION").is_file() and list((stack.home / "s3" / "dvc").rglob("*"))


def test_data_are_deleted_after_a_yes_alone(stack):
    assert "kept" in stack.command("down", "--delete-data", stdin="y\n").stdout
    assert (stack.home / "s3").exists()
    assert "deleted" in stack.command("down", "--delete-data", stdin="yes\n").stdout
    assert not stack.home.exists()
