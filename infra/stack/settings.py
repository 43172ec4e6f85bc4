"""What the stack is told: infra/.env, over it the environment. Nothing has a password by default.

Secrets travel by environment or by files of mode 600, never on a command line, where `ps` shows them to everybody.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from flows import ENVIRONMENT
from rankwise.types import UserError

FILE = Path("infra/.env")
EXAMPLE = Path("infra/env.example")
POOL = "rankwise"
GPU_LIMIT = "rankwise-gpu"
BUCKETS = ("dvc", "mlflow")
S3_USER = "rankwise"
DATABASE_USER = "rankwise"
ADMIN = "admin"  # of Prefect and of MLflow
SECRETS = tuple(
    f"RANKWISE_{name}"
    for name in ("POSTGRES_PASSWORD", "PREFECT_PASSWORD", "MLFLOW_PASSWORD", "S3_SECRET", "MLFLOW_FORM_KEY", "VLLM_KEY")
)

# For every client of S3. rclone answers with the checksum of one part of a large upload where it should be that of
# the whole, so a client that compares refuses every file above 50 MB; DVC compares the MD5 of what it gets itself.
S3_CLIENT = {
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}
# Seconds between signs of life of a flow run that no deployment starts; prefect.yaml has it for the others.
HEARTBEAT_S = 30


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The stack as infra/.env and the environment describe it."""

    root: Path  # data, logs and process ids
    bind: str  # the address that Prefect, MLflow and S3 listen on
    ports: dict[str, int]  # "postgres", "s3", "prefect", "mlflow"
    mlflow_hosts: str
    runs: int  # flow runs of the worker at a time
    gpus: int  # GPU stages at a time
    postgres_password: str
    prefect_password: str
    mlflow_password: str
    mlflow_form_key: str
    s3_secret: str
    for_worker: dict[str, str]  # optional ones, as they are: servers to ask, their keys, the repository

    def address(self, service: str) -> str:
        """HOST:PORT of "postgres", "s3", "prefect" or "mlflow", as clients of this machine reach it."""
        host = "127.0.0.1" if service == "postgres" or self.bind in ("0.0.0.0", "::") else self.bind
        return f"[{host}]:{self.ports[service]}" if ":" in host else f"{host}:{self.ports[service]}"

    def url(self, service: str) -> str:
        return f"http://{self.address(service)}"

    def postgres_client(self) -> dict[str, str]:
        """The environment of a client of PostgreSQL (libpq, asyncpg)."""
        return {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.ports["postgres"]),
            "PGUSER": DATABASE_USER,
            "PGPASSWORD": self.postgres_password,
        }

    def s3_client(self) -> dict[str, str]:
        """The environment of a client of S3 (boto3, DVC)."""
        return {
            "AWS_ACCESS_KEY_ID": S3_USER,
            "AWS_SECRET_ACCESS_KEY": self.s3_secret,
            "AWS_ENDPOINT_URL": self.url("s3"),
            **S3_CLIENT,
        }

    def client(self) -> dict[str, str]:
        """The environment of a person, a flow run or a worker that uses the stack."""
        return {
            "PREFECT_API_URL": f"{self.url('prefect')}/api",
            "PREFECT_API_AUTH_STRING": f"{ADMIN}:{self.prefect_password}",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "MLFLOW_TRACKING_USERNAME": ADMIN,
            "MLFLOW_TRACKING_PASSWORD": self.mlflow_password,
            **self.s3_client(),
            "RANKWISE_REMOTE": "s3://dvc",
            **{name: value for name, value in ENVIRONMENT.items() if "LOGGING_FORMATTERS" not in name},
        }


def read() -> Settings:
    """The stack's settings; raises UserError that names a variable which is missing or cannot be used."""
    known = parse(EXAMPLE)
    optional = set(re.findall(r"^# ([A-Z0-9_]+)=$", EXAMPLE.read_text(encoding="utf-8"), re.M))
    given = parse(FILE) if FILE.exists() else {}
    if unknown := sorted(given.keys() - known.keys() - optional):
        raise UserError(f"{FILE}: {unknown[0]} is unknown; {EXAMPLE} lists what there is")
    names = known.keys() | optional
    values = known | given | {name: os.environ[name] for name in names if name in os.environ}

    def text(name: str) -> str:
        if not (value := values[name]) and not FILE.exists():
            raise UserError(
                f"{name} is not set: there is no {FILE}; make up, or python -m infra.stack passwords, writes it"
            )
        if not value:
            raise UserError(f"{name} is empty; write a value into {FILE}")
        return value

    def count(name: str, most: int) -> int:
        if not text(name).isdecimal() or not 1 <= int(text(name)) <= most:
            raise UserError(f"{name} is {text(name)!r}; it must be a whole number from 1 to {most}")
        return int(text(name))

    secret = text("RANKWISE_S3_SECRET")
    if re.search(r'[",\s]', secret):
        raise UserError("RANKWISE_S3_SECRET has a comma, quote or blank in it, which rclone cannot take; use others")
    if len(text("RANKWISE_MLFLOW_PASSWORD")) < 12:
        raise UserError("RANKWISE_MLFLOW_PASSWORD has fewer than 12 characters, MLflow's least; give it more")
    home = Path(os.environ.get("RANKWISE_HOME", ".rankwise"))
    return Settings(
        root=Path(os.environ.get("RANKWISE_STACK", home / "stack")).resolve(),
        bind=text("RANKWISE_BIND"),
        ports={name: count(f"RANKWISE_{name.upper()}_PORT", 65535) for name in ("postgres", "s3", "prefect", "mlflow")},
        mlflow_hosts=text("RANKWISE_MLFLOW_HOSTS"),
        runs=count("RANKWISE_RUNS", 1000),
        gpus=count("RANKWISE_GPUS", 100_000),
        postgres_password=text("RANKWISE_POSTGRES_PASSWORD"),
        prefect_password=text("RANKWISE_PREFECT_PASSWORD"),
        mlflow_password=text("RANKWISE_MLFLOW_PASSWORD"),
        mlflow_form_key=text("RANKWISE_MLFLOW_FORM_KEY"),
        s3_secret=secret,
        for_worker={name: values[name] for name in optional if values.get(name)},
    )


def parse(file: Path) -> dict[str, str]:
    """Lines of NAME=value; raises UserError at any other line."""
    values = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if not (found := re.fullmatch(r"([A-Z][A-Z0-9_]*)=(.*)", line)):
            raise UserError(f"{file}, line {number}: no NAME=value; mend or remove the line")
        values[found[1]] = found[2].strip()
    return values


def write_once() -> bool:
    """Write infra/.env with random secrets where it is absent; returns whether it did."""
    if FILE.exists():
        return False
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    fresh = {f"{name}=": f"{name}={secrets.token_hex(20)}" for name in SECRETS}
    fresh["RANKWISE_GPUS=1"] = f"RANKWISE_GPUS={max(1, _gpus())}"
    text = "\n".join(fresh.get(line, line) for line in lines)
    aside = FILE.with_name(f".env.{os.getpid()}")
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
        out.write(text + "\n")
    aside.rename(FILE)
    return True


def _gpus() -> int:
    """GPUs of this machine that the driver knows."""
    if shutil.which("nvidia-smi") is None:
        return 0
    told = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return len(told.stdout.splitlines()) if told.returncode == 0 else 0
