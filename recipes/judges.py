"""Programmatic judges: functions of (prompt, answer) that return a score; a higher one is better.

Name one in params.yaml as `recipes.judges:FUNCTION` (judge.kind: callable), and write your own here.
"""

from __future__ import annotations

import re

_SPEECH = re.compile(r'"[^"]+"')


def dialogue(prompt: str, answer: str) -> float:
    """Stories in which people talk: share of the answer's words that stand inside quotation marks, in [0, 1]."""
    words = len(answer.split())
    return sum(len(spoken.split()) for spoken in _SPEECH.findall(answer)) / words if words else 0.0
