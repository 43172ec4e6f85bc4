"""Make the databases that Prefect and MLflow need, where they are missing: `python -m infra.stack.databases`.

PGHOST, PGPORT, PGUSER and PGPASSWORD say where, as for psql. Prefect and MLflow make their tables by themselves.
"""

from __future__ import annotations

import contextlib
import sys

NAMES = ("prefect", "mlflow", "mlflow_auth")


def main() -> int:
    """Create what is missing; returns the exit status."""
    import psycopg2

    try:
        connection = psycopg2.connect(dbname="postgres", connect_timeout=10)
    except psycopg2.OperationalError as error:
        print(f"error: PostgreSQL: {str(error).strip()}", file=sys.stderr)
        return 2
    connection.autocommit = True  # CREATE DATABASE bears no transaction
    with contextlib.closing(connection), connection.cursor() as cursor:
        cursor.execute("SELECT datname FROM pg_database")
        there = {name for (name,) in cursor}
        for name in NAMES:
            if name not in there:
                cursor.execute(f"CREATE DATABASE {name} ENCODING 'UTF8' TEMPLATE template0")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
