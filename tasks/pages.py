"""What the pages of reports share: their look, the answer in a band at their head, pictures inside the file, Markdown.

Texts are data: tasks.markup escapes them in HTML, `cell` in Markdown.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from tasks.markup import Html, tag

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1b1b; --soft: #5c5c5c; --line: #d8d8d8; --card: #f5f5f3;
  --good: #00694b; --bad: #a5122a; --open: #7a5200; }
@media (prefers-color-scheme: dark) {
  :root { --back: #141414; --text: #e8e8e8; --soft: #a6a6a6; --line: #3a3a3a; --card: #1f1f1f;
    --good: #5fd3a8; --bad: #ff8a9a; --open: #f0c268; }
  img { background: #fff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1rem 3rem; max-width: 62rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.05rem; font-weight: 600; margin: 0 0 .6rem; color: var(--soft); }
h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .35rem 0; }
.soft { color: var(--soft); font-size: .9rem; }
.verdict { border-left: 6px solid var(--soft); background: var(--card); border-radius: .4rem; padding: .7rem .9rem;
  margin: 0 0 .8rem; }
.verdict.fail { border-color: var(--bad); }
.verdict.pass { border-color: var(--good); }
.answer { font-size: 1.45rem; line-height: 1.25; font-weight: 700; margin: 0 0 .2rem; }
.fail .answer, td.fail { color: var(--bad); }
.pass .answer, td.pass { color: var(--good); }
td.open { color: var(--open); }
td.fail, td.pass, td.open { font-weight: 600; }
ul { margin: .5rem 0 0; padding-left: 1.1rem; }
li { margin: .35rem 0; }
.counts { margin: .5rem 0 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-top: 1px solid var(--line); }
th { color: var(--soft); font-weight: normal; border: 0; white-space: nowrap; }
.wide td:nth-child(n + 3) { white-space: nowrap; }
figure { margin: 1rem 0; }
figcaption { font-size: .9rem; color: var(--soft); }
img { max-width: 100%; height: auto; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 1.2rem; }
@media (max-width: 40rem) {
  body { padding: .7rem .7rem 3rem; }
  .wide thead { display: none; }
  .wide tr { display: block; border-top: 1px solid var(--line); padding: .4rem 0; }
  .wide td { display: inline-block; border: 0; padding: 0 .9rem 0 0; }
  .wide td:empty { display: none; }
  .wide td::before { content: attr(data-name) ": "; color: var(--soft); font-weight: normal; }
  .wide td:first-child { display: block; font-weight: 600; }
  .wide td:first-child::before { content: ""; }
}
"""


def band(kind: str, line: str, about: str, items: Sequence[Html]) -> Html:
    """The answer of a page in a line, what it is about, and a few more lines. kind: "pass", "fail" or "none"."""
    parts = [tag("p", line, class_="answer"), tag("p", about, class_="soft")]
    return tag("div", *parts, *([tag("ul", *items)] if items else []), class_=f"verdict {kind}")


def picture(caption: str, path: Path) -> Html:
    """A picture inside the file."""
    data = base64.b64encode(path.read_bytes()).decode()
    return tag("figure", tag("img", src=f"data:image/png;base64,{data}", alt=caption), tag("figcaption", caption))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, line by line; its cells are data."""
    line = lambda cells: "| " + " | ".join(map(cell, cells)) + " |"
    return [line(columns), "|" + "---|" * len(columns), *map(line, rows)]


def cell(text: str) -> str:
    """Text that cannot leave its cell or become markup."""
    for character in "\\`*_<>|[]":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
