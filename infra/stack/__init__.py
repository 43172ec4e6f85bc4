"""The services of a team on one machine, without Docker: PostgreSQL, S3, Prefect, MLflow and a worker.

`python -m infra.stack --help` shows the command (`make up`, `make down`). infra/compose.yaml runs the same services
in containers, infra/kubernetes in a cluster; all of them use infra.stack.databases and infra.stack.setup.
"""
