"""The programs of the stack: how each is started and how it says that it is well."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from flows import ENVIRONMENT
from infra.stack import postgres
from infra.stack.processes import Service
from infra.stack.settings import ADMIN, BUCKETS, DATABASE_USER, POOL, S3_USER, Settings
from rankwise.types import UserError

BIN = Path(sys.executable).parent
# Several workers would each compile, hash passwords and hold 0.4 GiB; one serves a team of tens.
MLFLOW_WORKERS = "1"


def services(settings: Settings) -> list[Service]:
    """All of them, each after those that it needs."""
    return [_postgres(settings), _s3(settings), _prefect(settings), _mlflow(settings), _worker(settings)]


def _postgres(settings: Settings) -> Service:
    data = settings.root / "postgres"
    options = {
        "listen_addresses": "127.0.0.1",
        "port": str(settings.ports["postgres"]),
        "unix_socket_directories": "",
        "max_connections": "200",
    }
    return Service(
        name="postgres",
        what="PostgreSQL",
        address=settings.address("postgres"),
        port=("127.0.0.1", settings.ports["postgres"]),
        command=[postgres.program("postgres"), "-D", str(data), *(f"--{key}={text}" for key, text in options.items())],
        environment={},
        healthy=lambda: _postgres_answers(settings),
        prepare=lambda: _prepare_postgres(data, settings.postgres_password),
        user=postgres.user(),
        stop_signal=signal.SIGINT,  # its fast way: connections are closed, nothing is lost
        start_s=60,
    )


def _prepare_postgres(data: Path, password: str) -> None:
    postgres.initialize(data, password)
    postgres.wait_for_the_last(data)


def _postgres_answers(settings: Settings) -> bool:
    import psycopg2

    try:
        psycopg2.connect(
            host="127.0.0.1",
            port=settings.ports["postgres"],
            user=DATABASE_USER,
            password=settings.postgres_password,
            dbname="postgres",
            connect_timeout=5,
        ).close()
    except psycopg2.OperationalError as error:
        if "password authentication failed" in str(error):
            raise UserError(
                "PostgreSQL refuses RANKWISE_POSTGRES_PASSWORD: the data of this stack were made with another one. "
                "Give it back, or change it in the database too: ALTER USER rankwise PASSWORD '...'"
            ) from None
        return False
    return True


def _s3(settings: Settings) -> Service:
    folder = settings.root / "s3"
    return Service(
        name="s3",
        what="S3-compatible store (rclone)",
        address=settings.url("s3"),
        port=(settings.bind, settings.ports["s3"]),
        # Without ETags: they are the MD5 of all files, which the first listing after each start would have to read.
        command=[
            *(str(BIN / "rclone"), "serve", "s3", str(folder)),
            *("--addr", _listen(settings, "s3"), "--etag-hash", ""),
        ],
        environment={"RCLONE_CONFIG": "", "RCLONE_AUTH_KEY": f'"{S3_USER},{settings.s3_secret}"'},
        healthy=lambda: _status(settings.url("s3")) is not None,
        prepare=lambda: _make_buckets(folder),
    )


def _make_buckets(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # other users of the machine have to ask the store
    for bucket in BUCKETS:
        (folder / bucket).mkdir(parents=True, exist_ok=True)


def _prefect(settings: Settings) -> Service:
    return Service(
        name="prefect",
        what="Prefect server",
        address=settings.url("prefect"),
        port=(settings.bind, settings.ports["prefect"]),
        command=[
            *(sys.executable, "-m", "prefect", "server", "start"),
            *("--host", settings.bind, "--port", str(settings.ports["prefect"])),
        ],
        environment={
            **ENVIRONMENT,
            **settings.postgres_client(),
            "PREFECT_HOME": str(settings.root / "prefect"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg:///prefect",
            "PREFECT_SERVER_API_AUTH_STRING": f"{ADMIN}:{settings.prefect_password}",
            "PREFECT_UI_URL": settings.url("prefect"),  # what links in notifications begin with
            "PREFECT_SERVER_UI_API_URL": "/api",  # relative: the page works under any name of this machine
        },
        healthy=lambda: _status(f"{settings.url('prefect')}/api/health") == 200,
        prepare=lambda: _make_databases(settings),
        after=("postgres",),
    )


def _mlflow(settings: Settings) -> Service:
    return Service(
        name="mlflow",
        what="MLflow server",
        address=settings.url("mlflow"),
        port=(settings.bind, settings.ports["mlflow"]),
        command=[
            *(sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", MLFLOW_WORKERS),
            *("--host", settings.bind, "--port", str(settings.ports["mlflow"])),
            *("--artifacts-destination", "s3://mlflow"),
        ],
        environment={
            **ENVIRONMENT,
            **settings.postgres_client(),
            **settings.s3_client(),
            "MLFLOW_BACKEND_STORE_URI": "postgresql:///mlflow",
            "MLFLOW_AUTH_CONFIG_PATH": str(Path("infra/mlflow_auth.ini").resolve()),
            "MLFLOW_AUTH_ADMIN_PASSWORD": settings.mlflow_password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": settings.mlflow_form_key,
            "MLFLOW_S3_ENDPOINT_URL": settings.url("s3"),
            "MLFLOW_SERVER_ALLOWED_HOSTS": settings.mlflow_hosts,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # five more processes and 2 GiB otherwise
        },
        healthy=lambda: _status(f"{settings.url('mlflow')}/health") == 200,
        prepare=lambda: _make_databases(settings),
        after=("postgres", "s3"),
    )


def _worker(settings: Settings) -> Service:
    name = f"{POOL}-{os.uname().nodename}"
    return Service(
        name="worker",
        what="Prefect worker",
        address=f"pool {POOL}",
        port=None,
        command=[
            *(sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"),
            *("--name", name, "--limit", str(settings.runs), "--install-policy", "never"),
        ],
        environment={**settings.client(), **settings.for_worker, "PREFECT_HOME": str(settings.root / "worker")},
        healthy=lambda: _worker_is_online(settings, name),
        spared=True,
        after=("prefect",),
    )


def _listen(settings: Settings, service: str) -> str:
    host = f"[{settings.bind}]" if ":" in settings.bind else settings.bind
    return f"{host}:{settings.ports[service]}"


def _make_databases(settings: Settings) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "infra.stack.databases"],
        env={**os.environ, **settings.postgres_client()},
        capture_output=True,
        text=True,
    )
    if made.returncode != 0:
        raise UserError(made.stderr.strip().removeprefix("error: "))


def _worker_is_online(settings: Settings, name: str) -> bool:
    token = base64.b64encode(f"{ADMIN}:{settings.prefect_password}".encode()).decode()
    request = urllib.request.Request(
        f"{settings.url('prefect')}/api/work_pools/{POOL}/workers/filter",
        data=b"{}",
        headers={"Authorization": f"Basic {token}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return any(worker["name"] == name and worker["status"] == "ONLINE" for worker in json.load(reply))
    except (OSError, ValueError):
        return False


def _status(url: str) -> int | None:
    """The HTTP status of an address; None where nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
