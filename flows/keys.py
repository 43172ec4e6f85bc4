"""Keys of servers from Prefect's Secret blocks, for stages whose environment names a server and has no key for it.

The block of RANKWISE_JUDGE_API_KEY is named rankwise-judge-api-key, and so on. Prefect keeps it encrypted; a key goes
from there into the environment of the stages and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping

from rankwise.types import UserError


def from_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that are wanted and that there is a block for; raises UserError where a block holds no text."""
    wanted = [
        variable
        for name in sorted(environment)
        if name.startswith("RANKWISE_") and name.endswith("_URL")
        if not environment.get(variable := f"{name.removesuffix('_URL')}_API_KEY")
    ]
    if not wanted:
        return {}
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = {variable: _secret(client, variable.lower().replace("_", "-")) for variable in wanted}
    return {variable: key for variable, key in found.items() if key is not None}


def _secret(client, block: str) -> str | None:
    from prefect.exceptions import ObjectNotFound

    try:
        value = client.read_block_document_by_name(block, "secret").data.get("value")
    except ObjectNotFound:
        return None
    if not isinstance(value, str) or not value:
        raise UserError(
            f"Prefect's Secret block {block} holds {type(value).__name__}, no text; save the key itself in it"
        )
    return value
