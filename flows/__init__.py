"""Flows: when stages run, in which order, with which retries, and what a person sees of it. Prefect lives here only.

The graph itself is dvc.yaml; `python -m flows.align --help` shows the command.

Importing this package settles the environment of everything started from here: work at import time, the one
place of it, because Prefect, MLflow and DVC read these variables when they are imported. A value that is set
already wins.
"""

import os

ENVIRONMENT = {
    # No telemetry from anything that a run starts. MLflow wants the word: DO_NOT_TRACK=1 does not stop it.
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Prefect without a server would keep runs in a temporary one that loses most task runs: never that.
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
    # DVC decides what is stale. A second cache would be a second truth.
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
    # A stage's lines reach the log when they are printed, not when a buffer is full.
    "PYTHONUNBUFFERED": "1",
    # One short prefix a line on the terminal: the time and the stage.
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s | %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s | %(task_run_name)s | %(message)s",
}

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
