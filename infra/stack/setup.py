"""What Prefect's server has to know before runs come: `python -m infra.stack.setup`, as often as one likes.

The work pool, the limit of GPU stages, an automation that ends runs whose process is gone, and the deployments of
prefect.yaml. PREFECT_API_URL and PREFECT_API_AUTH_STRING say which server. What a person changed there stays: only
what is missing is made, and the deployments are brought up to date.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

from infra.stack.settings import GPU_LIMIT, HEARTBEAT_S, POOL

ZOMBIES = "end runs whose process is gone"
# Three heartbeats and more may be late on a busy machine; a tighter limit ends runs that are well.
SILENCE = timedelta(seconds=6 * HEARTBEAT_S)


def main() -> int:
    """Make what is missing; returns the exit status."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        make_pool(client)
        make_gpu_limit(client, int(os.environ.get("RANKWISE_GPUS", "1")))
        if not client.read_automations_by_name(ZOMBIES):
            client.create_automation(automation=zombie_automation())
    deploy = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(deploy, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120"})
    if done.returncode != 0:
        print(f"error: prefect deploy --all failed:\n{done.stdout}{done.stderr}", file=sys.stderr)
    return done.returncode


def make_pool(client) -> None:
    """The work pool whose workers start runs as processes."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))


def make_gpu_limit(client, gpus: int) -> None:
    """The global concurrency limit that GPU stages take a slot of."""
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.exceptions import ObjectNotFound

    try:
        client.read_global_concurrency_limit_by_name(GPU_LIMIT)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=gpus))


def zombie_automation():
    """Crash a run that sent heartbeats and then neither another nor a last state for SILENCE."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    heartbeat = "prefect.flow-run.heartbeat"
    last = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    return AutomationCore(
        name=ZOMBIES,
        trigger=EventTrigger(
            after={heartbeat},
            expect={heartbeat, *last},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[
            ChangeFlowRunState(state=StateType.CRASHED, message=f"no heartbeat for {SILENCE.seconds} seconds"),
        ],
    )


if __name__ == "__main__":
    raise SystemExit(main())
