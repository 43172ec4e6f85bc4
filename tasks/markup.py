"""HTML made of data that may be hostile: one element at a time, and one file that needs no other.

Markup is made by `tag` alone, which escapes every string that is not `Html` already, so nothing can be forgotten.
Behind that stands a policy in the file itself (`document`): only the script given may run, by its hash, and nothing can
be loaded or sent. Control tokens, and characters that cannot be seen or that turn the direction of writing, are shown
as what they are (`text_of`).

Example:
    page = document("Verdicts", [tag("p", reason, class_="soft")], style="p { margin: 0; }")
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence

from rankwise.rubrics import MARKERS, PATTERNS

CONTROLS = re.compile("|".join([*map(re.escape, sorted(MARKERS, key=len, reverse=True)), *PATTERNS]))
# C0 and C1 controls but tab and line ends, soft hyphen, zero-width and bidirectional formatting, invisible tags.
_UNSEEN = (
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\U000e0000-\U000e007f]|\r(?!\n)"
)
_MARKED = re.compile(f"(?P<unseen>{_UNSEEN})|(?P<control>{CONTROLS.pattern})")
_VOID = {"meta", "input", "img"}


class Html(str):
    """Text that is markup; any other string is data."""


def tag(name: str, /, *parts: str, **attributes: str | bool | None) -> Html:
    """An element: strings are escaped, Html is not. class_="x" and data_kind="y" become class and data-kind."""
    inside = "".join(part if isinstance(part, Html) else html.escape(part) for part in parts)
    given = ""
    for key, value in attributes.items():
        if value not in (None, False):
            given += " " + key.rstrip("_").replace("_", "-")
            given += "" if value is True else f'="{html.escape(value)}"'
    return Html(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{inside}</{name}>")


def text_of(text: str, limit: int) -> Html:
    """Text as data: control tokens and unseen characters marked, the end left out where there is more than limit."""
    parts, end, kept = [], 0, text[:limit]
    for found in _MARKED.finditer(kept):
        parts.append(html.escape(kept[end : found.start()]))
        end = found.end()
        if found["unseen"]:
            parts.append(tag("mark", f"U+{ord(found[0]):04X}", title="a character that cannot be seen"))
        else:
            parts.append(tag("mark", found[0], title="a control token"))
    left = len(text) - len(kept)
    more = tag("span", f" … {left:,} more characters", class_="soft") if left else ""
    return Html("".join([*parts, html.escape(kept[end:]), more]))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], **attributes: str) -> Html:
    """A table whose cells know the names of their columns (data-name), for screens too narrow for a table."""
    head = tag("thead", tag("tr", *(tag("th", column) for column in columns)))
    cells = lambda row: (tag("td", cell, data_name=column) if cell else tag("td") for column, cell in zip(columns, row))
    return tag("table", head, tag("tbody", *(tag("tr", *cells(row)) for row in rows)), **attributes)


def document(title: str, body: Sequence[str], *, style: str, script: str = "") -> str:
    """A whole file. Of scripts and styles only those given count, whatever the body holds: no style attributes.

    Pictures may stand in the file itself, as data: addresses.
    """
    own = f"img-src data:; script-src {_only(script)}; style-src {_only(style)}"
    policy = f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(style)),
    ]
    whole = tag("html", tag("head", *head), "\n", tag("body", *body, tag("script", Html(script))), lang="en")
    return f"<!doctype html>\n{whole}\n"


def _only(text: str) -> str:
    """The source of a policy that one text alone meets."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
