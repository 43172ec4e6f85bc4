"""A blind sheet for people: pairs of answers from the rollouts, of which one says for each which is better.

    python -m tasks.label_sheet --rows 100 --out sheet.csv        for a spreadsheet
    python -m tasks.label_sheet --rows 100 --out sheet.html       a form for a browser, which needs no network

Fill in column verdict (A, B or tie; left empty, a pair is not answered) and annotator, or send the form's file. Put the
file into data/source and name it as a judge:

    verdicts: {judge: {kind: stored, verdicts: sheet.csv}}

Blind: which answer stands first is drawn by the seed, and nothing in the sheet says who wrote what. Who answers sees
both at once, so a verdict counts for both orders (column order: none). Pairs come from as many prompts as there are.
They are found again by column pair, a hash of their texts, so it is of no matter what a spreadsheet does to a text;
an apostrophe stands before whatever looks like the start of a formula, in a cell or after what might end one.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.fingerprint import digest
from rankwise.rows import read_rows, write_aside
from rankwise.stored_lines import question_key
from rankwise.types import Row, UserError, show_prompt
from tasks.markup import Html, document, tag, text_of

COLUMNS = ("number", "prompt", "A", "B", "verdict", "reason", "annotator", "order", "pair")
# What a spreadsheet would compute, at the start of a cell or where one that cuts at another sign would see a start.
FORMULA = re.compile(r"(?:^|(?<=[;,\t\r\n]))(?=(?:[^\S\t\r\n]|[\u200b\ufeff])*[=+\-@＝＋－＠])|^(?= *[\t\r])")
LONGEST_CELL = 32_000  # characters; spreadsheets cut at 32,767
NO_LIMIT = 10**9

STYLE = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: .8rem 1rem 4rem; max-width: 76rem; font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.2rem; }
fieldset { margin: 0 0 1.2rem; border: 1px solid #8888; border-radius: .5rem; }
fieldset:has(:checked) { border-color: #2a7; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: .3rem 0; }
.prompt { border-left: 3px solid #8888; padding-left: .7rem; }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; }
.answers div { background: #8881; border-radius: .4rem; padding: .1rem .7rem; }
@media (max-width: 45rem) { .answers { grid-template-columns: 1fr; } }
label { margin-right: 1rem; cursor: pointer; }
input[type=text] { width: min(30rem, 100%); font: inherit; }
mark { background: #fd48; }
footer { position: fixed; inset: auto 0 0; background: Canvas; border-top: 1px solid #8888; padding: .4rem 1rem; }
button { font: inherit; }
"""
SCRIPT = """
const sheet = document.querySelector("main").dataset.sheet, sets = [...document.querySelectorAll("fieldset")];
const who = document.getElementById("who"), told = document.getElementById("told");
const verdict = set => (set.querySelector(":checked") || {value: ""}).value;
const reason = set => set.querySelector("input[type=text]").value;
let kept = {};
try { kept = JSON.parse(localStorage.getItem(sheet) || "{}"); } catch { /* a browser that keeps nothing */ }
who.value = kept.who || "";
for (const set of sets) {
  const [said, why] = (kept.said || {})[set.dataset.pair] || ["", ""];
  for (const input of set.querySelectorAll("input[type=radio]")) input.checked = input.value === said;
  set.querySelector("input[type=text]").value = why;
}
function keep() {
  const said = Object.fromEntries(sets.map(set => [set.dataset.pair, [verdict(set), reason(set)]]));
  try { localStorage.setItem(sheet, JSON.stringify({who: who.value, said})); } catch { /* as above */ }
  tell();
}
function tell() { told.textContent = `${sets.filter(verdict).length} of ${sets.length} answered`; }
document.addEventListener("input", keep);
document.getElementById("save").addEventListener("click", () => {
  const lines = sets.filter(verdict).map(set => JSON.stringify({pair: set.dataset.pair, verdict: verdict(set),
    reason: reason(set), annotator: who.value.trim(), order: "none"}) + "\\n");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, {type: "application/x-ndjson"}));
  link.download = `labels-${who.value.trim().replace(/[^A-Za-z0-9]+/g, "-") || "nobody"}.jsonl`;
  link.click();
});
tell();
"""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers as they are shown."""

    prompt: str
    first: str
    second: str
    key: str  # question_key of the two in this order


def draw(rows: Sequence[Row], count: int, *, seed: int, longest: int = NO_LIMIT) -> list[Pair]:
    """So many pairs of different answers, from as many rows as there are, in an order that the seed draws.

    What is drawn depends on the texts and the seed alone, not on the order of the rows or of their answers.

    Args:
        longest: characters; pairs with a longer prompt or answer are left out.

    Raises UserError where there are fewer pairs.
    """
    queues = [sorted(_pairs(row, seed, longest), key=lambda pair: digest(seed, pair.key)) for row in rows]
    rounds = itertools.zip_longest(*sorted(queues, key=lambda queue: digest(seed, "row", [pair.key for pair in queue])))
    # A row's second pair comes when every row has given its first. A prompt may stand in two rows with equal answers.
    found = {pair.key: pair for turn in rounds for pair in turn if pair is not None}
    if len(found) < count:
        raise UserError(
            f"--rows {count}: there are {len(found)} pairs of different answers"
            + (f" of at most {longest:,} characters" if longest < NO_LIMIT else "")
            + "; ask for fewer, or sample more answers"
        )
    return list(found.values())[:count]


def as_csv(pairs: Sequence[Pair]) -> str:
    """The sheet as CSV, every field in quotes, with a mark by which spreadsheets know UTF-8."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(COLUMNS)
    for number, pair in enumerate(pairs, 1):
        shown = map(harmless, (pair.prompt, pair.first, pair.second))
        writer.writerow([number, *shown, "", "", "", "none", pair.key])
    return f"\ufeff{text.getvalue()}"


def as_html(pairs: Sequence[Pair]) -> str:
    """The sheet as a form: one file that sends nothing, and saves the answers as .jsonl where the browser saves."""
    head = [
        tag("h1", "Which answer is better?"),
        tag("p", "What you choose is kept in this browser. When you are done, save it as a file and send that."),
        tag("p", tag("label", "Your name: ", tag("input", type="text", id="who"))),
    ]
    foot = tag("footer", tag("button", "Save as a file", type="button", id="save"), " ", tag("span", id="told"))
    sets = [_form(number, pair) for number, pair in enumerate(pairs, 1)]
    sheet = tag("main", *head, *sets, foot, data_sheet=digest([pair.key for pair in pairs]))
    return document("Which answer is better?", [sheet], style=STYLE, script=SCRIPT)


def harmless(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    return FORMULA.sub("'", text)


def _pairs(row: Row, seed: int, longest: int) -> Iterator[Pair]:
    prompt = show_prompt(row.prompt)
    texts = sorted({answer.text for answer in row.answers})
    for pair in itertools.combinations(texts, 2):
        if max(map(len, (prompt, *pair))) <= longest:
            swapped = int(digest(seed, "order", question_key(row.prompt, pair)), 16) % 2
            first, second = pair[::-1] if swapped else pair
            key = question_key(row.prompt, (first, second))
            yield Pair(prompt=prompt, first=first, second=second, key=key)


def _form(number: int, pair: Pair) -> Html:
    # A browser drops the first line end of a pre.
    shown = lambda text: tag("pre", "\n", text_of(text, NO_LIMIT))
    name = f"n{number}"
    choices = [
        tag("label", tag("input", type="radio", name=name, value=said), f" {words}")
        for said, words in (("A", "A is better"), ("B", "B is better"), ("tie", "neither"), ("", "not answered"))
    ]
    answers = [tag("div", tag("b", letter), shown(text)) for letter, text in zip("AB", (pair.first, pair.second))]
    why = tag("label", "why (may be left out): ", tag("input", type="text"))
    return tag(
        "fieldset",
        tag("legend", str(number)),
        tag("div", shown(pair.prompt), class_="prompt"),
        tag("div", *answers, class_="answers"),
        tag("p", *choices),
        tag("p", why),
        data_pair=pair.key,
    )


def _write(out: Path, text: str) -> None:
    try:
        write_aside(out, lambda aside: aside.write_text(text, encoding="utf-8", newline=""))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error}); name a file in a folder that is yours") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.label_sheet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, required=True, help="pairs to draw")
    parser.add_argument("--out", type=Path, required=True, help="file to write: .csv or .html")
    parser.add_argument("--rollouts", type=Path, default=Path("data/rollouts.parquet"), help="table (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of the orders (%(default)s)")
    arguments = parser.parse_args(argv)
    write = {".csv": as_csv, ".html": as_html}.get(arguments.out.suffix)
    try:
        if write is None:
            raise UserError(f"--out {arguments.out}: a name that ends in .csv or .html was expected")
        if arguments.rows < 1:
            raise UserError(f"--rows {arguments.rows}: at least one pair was expected")
        longest = LONGEST_CELL if write is as_csv else NO_LIMIT
        pairs = draw(read_rows(arguments.rollouts), arguments.rows, seed=arguments.seed, longest=longest)
        if arguments.out.exists():
            raise UserError(f"--out {arguments.out}: is there already, perhaps filled in; move it away or name another")
        _write(arguments.out, write(pairs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {len(pairs)} pairs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
