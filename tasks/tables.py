"""The six tables of stage prompts: their names, and what two rows may have in common that leaks."""

from __future__ import annotations

from rankwise.types import Row, show_prompt

TABLES = ("sft", "rollout", "eval", "labelled", "labelled_test", "preferences")
TRAINED = ("sft", "rollout", "labelled", "preferences")  # what may share nothing with eval
RANKED = ("labelled", "labelled_test", "preferences")  # what holds ranked rows alone
JUDGED = ("labelled", "labelled_test")  # what a judge reads, not the policy


def keys(row: Row) -> list[str]:
    """What a row may not share with a held-out row: its group, and its prompt (or, without one, its texts)."""
    groups = [f"group {row.meta['group']}"] if row.meta.get("group") is not None else []
    prompt = " ".join(show_prompt(row.prompt).split())
    return [*groups, *([f"prompt {prompt}"] if prompt else [f"text {answer.text}" for answer in row.answers])]
