"""What Prefect's server has to know before runs come: `python -m infra.stack.setup`, as often as one likes.

The work pool, the limit of GPU stages, the automations (flows/automations.py) and the deployments of prefect.yaml.
PREFECT_API_URL and PREFECT_API_AUTH_STRING say which server, RANKWISE_GPUS how many GPU stages there may be at a time.
What a person changed there stays: only what is missing is made; deployments are brought up to date. Runs are processes
of the worker unless another kind of pool is asked for:

    python -m infra.stack.setup --type kubernetes --template infra/pools/kubernetes.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from infra.stack.settings import GPU_LIMIT, POOL


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.stack.setup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--type", default="process", choices=["process", "kubernetes", "docker"], help="of the pool")
    parser.add_argument("--template", type=Path, metavar="FILE", help="base job template, for a pool that is new")
    given = parser.parse_args(arguments)
    if given.type != "process" and given.template is None:
        parser.error(f"--type {given.type} needs --template infra/pools/{given.type}.json")
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        make_pool(client, given.type, given.template)
        make_gpu_limit(client, int(os.environ.get("RANKWISE_GPUS", "1")))
        make_automations(client)
    deploy = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(deploy, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120"})
    if done.returncode != 0:
        print(f"error: prefect deploy --all failed:\n{done.stdout}{done.stderr}", file=sys.stderr)
    return done.returncode


def make_pool(client, kind: str, template: Path | None) -> None:
    """The work pool that all deployments name; a template says what its runs are started as."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        default = ProcessWorker.get_default_base_job_template
        base = json.loads(template.read_text(encoding="utf-8")) if template else default()
        client.create_work_pool(WorkPoolCreate(name=POOL, type=kind, base_job_template=base))


def make_gpu_limit(client, gpus: int) -> None:
    """The global concurrency limit that GPU stages take a slot of."""
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.exceptions import ObjectNotFound

    try:
        client.read_global_concurrency_limit_by_name(GPU_LIMIT)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=gpus))


def make_automations(client) -> None:
    """What Prefect does by itself about runs; the options of flows.automations are for a person."""
    from flows.automations import wanted

    for automation in wanted():
        if not client.read_automations_by_name(automation.name):
            automation.create()


if __name__ == "__main__":
    raise SystemExit(main())
