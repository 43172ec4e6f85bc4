"""What commands ask of the model registry in MLflow, one method an act. Imported by tasks.tracking_worker alone.

Aliases are moved only while they are what the command saw: a look, a decision and a move are some time apart, and
somebody else may have decided meanwhile.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from tasks import tracking_backfill, tracking_models, tracking_notes
from tasks.tracking_runs import address_of, open_store


class Acts:
    """A connection to the registry of the store in use."""

    def __init__(self):
        self.client, self.experiment = open_store()

    def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        """Carry out one act; the answer holds "refused", with the reason, where the registry says no to it."""
        facts = {key: value for key, value in message.items() if key != "do"}
        return getattr(self, f"do_{message['do']}")(**facts)

    def give_up(self) -> None:
        """Nothing is left half done: each act is whole in itself."""

    def do_end(self, **_: Any) -> dict[str, Any]:
        return {"ended": True}

    def do_versions(self, name: str) -> dict[str, Any]:
        """Every version of a model, newest first: {"versions": [{"version", "tags", …}], "aliases", "url"}."""
        try:
            model = self.client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return {"refused": f"{name}: no model of this name is registered; register one first: dvc repro register"}
        found = self.client.search_model_versions(f"name = '{name}'", order_by=["version_number DESC"])
        versions = [self.client.get_model_version(name, str(one.version)) for one in found]
        return {
            "versions": [
                {
                    "version": str(one.version),
                    "tags": one.tags,
                    "url": address_of(tracking_notes.model_page(name, str(one.version))),
                }
                for one in versions
            ],
            "aliases": {alias: str(version) for alias, version in model.aliases.items()},
            "url": address_of(tracking_notes.model_page(name)),
        }

    def do_note(self, name: str, version: str, tags: dict[str, str], text: str) -> dict[str, Any]:
        """Facts of a promotion on a version's page; "" removes a tag, the text replaces that of an earlier one."""
        self._tag(name, version, tags)
        given = self.client.get_model_version(name, version).description or ""
        self.client.update_model_version(name, version, tracking_models.with_promotion(given, text))
        return {}

    def do_move(
        self, name: str, seen: dict[str, str | None], to: dict[str, str | None], tags: dict[str, dict[str, str]]
    ) -> dict[str, Any]:
        """Set aliases (None removes one) if they are as seen, else answer {"changed": what they are}.

        tags, by version, are written first: whoever sees the new champion also sees which one it replaced.
        """
        now = {alias: str(number) for alias, number in self.client.get_registered_model(name).aliases.items()}
        if any(now.get(alias) != number for alias, number in seen.items()):
            return {"changed": {alias: now.get(alias) for alias in seen}}
        for version, facts in tags.items():
            self._tag(name, version, facts)
        for alias, number in to.items():
            if number is not None:
                self.client.set_registered_model_alias(name, alias, number)
            elif alias in now:
                self.client.delete_registered_model_alias(name, alias)
        return {"moved": True}

    def do_download(self, name: str, version: str, folder: str) -> dict[str, Any]:
        """The copy of the weights that a version holds into a new folder: {"copied": False} where it holds none."""
        with tempfile.TemporaryDirectory(dir=Path(folder).parent) as scratch, tracking_models.patient():
            whole = Path(mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=scratch))
            (data,) = (path for path in (whole / "data").iterdir() if path.is_dir())
            if (data / "pointer.json").is_file():
                return {"copied": False}
            shutil.move(data, folder)
        return {"copied": True}

    def do_backfill(self) -> dict[str, Any]:
        """Runs for stages whose results no run has: {"runs": [{"stage", "state", "note"}]}."""
        return {"runs": tracking_backfill.backfill(self.client, self.experiment)}

    def _tag(self, name: str, version: str, tags: dict[str, str]) -> None:
        known = self.client.get_model_version(name, version).tags
        for key, value in tags.items():
            if value:
                self.client.set_model_version_tag(name, version, key, value)
            elif key in known:
                self.client.delete_model_version_tag(name, version, key)
