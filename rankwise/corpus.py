"""The embedded corpus: short reviews written from a seed, and a reader that scores the sentiment of any text.

Each review opens with a neutral fact; only then is its sentiment drawn, and a small grammar (rankwise.lexicon) writes
opinions of that sentiment, some of the opposite one, and facts. The writer records what it meant; ground_truth sees
the words alone, so it scores a language model's continuation by the same measure.

A score is (sum of w v) / (1 + sum of w) over the distinct opinions of a text: v in [-1, 1] is an opinion's valence
after negation and intensifiers, w its weight (CONCEDED in a concession, else 1). It is a mean with one neutral opinion
added: longer is not better by itself, one happy word is not enough, and saying a thing twice does not count twice.

Example:
    review = reviews(1, seed=7)[0]
    prompt, rest = opening(review.text, words=6)
    ground_truth(prompt, rest)  # near review.score
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rankwise import lexicon as lex
from rankwise.fingerprint import file_digest
from rankwise.types import UserError

WORD_RANGE = (25, 45)  # words of a review
OFF_TONE = 0.21  # share of sentences written against the label, before rejection
OWN_WORDS = 0.65  # share of adjectives and verbs that fit the aspect's kind alone
NEGATED, SCALED = 0.1, 0.36  # shares of adjectives behind a negator, or an intensifier or softener
NEVER_TWICE = {"companion", "city", "fact", "own_fact", "manner", "throughout", "rival", "period", "summing"}
CLOSED = 0.55  # share of reviews drawn with a closing verdict
CLEAR = 0.1  # the least |score| of a review: none is undecided


@dataclass(frozen=True, kw_only=True)
class Review:
    """A review and what its writer meant."""

    text: str
    label: str  # "positive" | "negative", the sign of score
    score: float  # in [-1, 1]; |score| >= CLEAR


def reviews(n: int, seed: int) -> list[Review]:
    """Write n reviews, half of them positive; review i depends on (seed, i) alone, so fewer are a prefix of more.

    Raises UserError where n is negative or either argument is no integer.
    """
    _need_whole("reviews", n=n, seed=seed)
    if n < 0:
        raise UserError(f"reviews: n={n} reviews cannot be written; ask for 0 or more")
    drafts = (draft(seed, index) for index in range(n))
    return [Review(text=d.text, label="positive" if d.score > 0 else "negative", score=d.score) for d in drafts]


def opening(text: str, words: int) -> tuple[str, str]:
    """Split after the first `words` words: prompt + rest == text, and the space between them opens the rest.

    Raises UserError where words is no integer or below 1, or where the text has no more words than that, so that
    nothing is left to write.
    """
    _need_whole("opening", words=words)
    if words < 1:
        raise UserError(f"opening: words={words} leaves no prompt; ask for 1 or more words")
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    if len(ends) <= words:
        raise UserError(
            f"opening: words={words}, but the text has {len(ends)} words and nothing would be left to continue: "
            f"{text[:60]!r}; ask for fewer words or leave this text out"
        )
    return text[: ends[words - 1]], text[ends[words - 1] :]


def ground_truth(prompt: str, answer: str) -> float:
    """The sentiment of the answer, in (-1, 1); 0.0 where it holds no opinion that the lexicon knows.

    The prompt counts as context alone: an answer " dull." after "It was not" is read as praise.
    """
    return lex.score(lex.read(prompt + answer, start=len(prompt)))


# As a judge, it depends on the lexicon too: kept scores must not outlive an edit of it.
ground_truth.identity = lambda: file_digest(Path(lex.__file__))


def _need_whole(function: str, **arguments: object) -> None:
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{function}: {name}={value!r} is not an integer; give a whole number")


# Writing -------------------------------------------------------------------------------------------------------------


class Draft(NamedTuple):
    """A review as written: what tests look at beside the text."""

    text: str
    frames: tuple[str, ...]  # a sentence each, its slots still {named}
    opinions: tuple[lex.Opinion, ...]
    score: float


def draft(seed: int, index: int) -> Draft:
    """Write review `index` of the corpus of this seed: first the opener, then the label, then a body for both."""
    rng = random.Random(f"rankwise corpus {seed} {index}")
    writer = _Writer(rng)
    opener = writer.write("{opener}", _Tone(1, 1.0, 1.0))
    # Neighbours 2i and 2i + 1 take opposite labels: balanced at any size, and no opener knows its own.
    sign = 1 if random.Random(f"rankwise labels {seed} {index // 2}").random() < 0.5 else -1
    sign = sign if index % 2 == 0 else -sign
    used = frozenset(writer.used)
    while True:
        writer.used, writer.opinions = set(used), []
        try:
            sentences = writer.body(opener, sign)
        except _Stuck:
            continue
        text = " ".join(sentence[:1].upper() + sentence[1:] for sentence, _ in sentences)
        score = lex.score(writer.opinions)
        fits = WORD_RANGE[0] <= text.count(" ") + 1 <= WORD_RANGE[1] and len(writer.opinions) > 1
        if fits and score * sign >= CLEAR:
            return Draft(text, tuple(frame for _, frame in sentences), tuple(writer.opinions), score)


@functools.cache
def _parts(template: str) -> tuple[tuple[str, str | None], ...]:
    """A template as (literal, None) and (slot name, flags) pairs."""
    pieces = re.split(r"\{(\w+)([!~^]*)\}", template)
    parts: list[tuple[str, str | None]] = [(pieces[0], None)]
    for name, flags, literal in zip(pieces[1::3], pieces[2::3], pieces[3::3]):
        parts += [(name, flags), (literal, None)]
    return tuple(part for part in parts if part[0])


class _Stuck(Exception):
    """No expression is left that fits; the body is begun anew."""


class _Tone(NamedTuple):
    sign: int  # 1: praise, -1: blame
    weight: float
    scope: float  # SCOPED under a negator that the frame spells out, else 1

    def shade(self, flags: str) -> _Tone:
        sign = -self.sign if "!" in flags else self.sign
        return _Tone(sign, lex.CONCEDED if "~" in flags else self.weight, lex.SCOPED if "^" in flags else self.scope)


class _Writer:
    """Writes one review; remembers the aspect in hand and what has been used, so that nothing is said twice."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.domain = rng.choice(sorted(lex.DOMAINS))
        self.words = {**lex.WORDS, **lex.DOMAINS[self.domain]}
        self.person = lex.PERSONS[rng.choice(("I", "we"))]
        self.words |= {name: (text,) for name, text in self.person.items()}
        self.phrases = lex.choices(self.domain)
        self.aspects = lex.aspects(self.domain)
        self.sign = 1  # of the review
        self.used: set[str] = set()
        self.opinions: list[lex.Opinion] = []
        self.aspect = lex.Aspect("", "any", False, False)

    def body(self, opener: tuple[str, str], sign: int) -> list[tuple[str, str]]:
        """The sentences, each with its frame; some are of the opposite sentiment."""
        rng, self.sign = self.rng, sign
        link = rng.choice((".", ".", ".", ", and {clause}.", "; {judgement}"))
        text, frame = self.write(link, self._tone(sign))
        kinds = rng.choices(("judgement", "contrast", "fact"), (46, 36, 18), k=rng.choice((1, 2, 2, 3)))
        sentences = [(opener[0] + text, opener[1] + frame)]
        sentences += [self.write(f"{{{kind}}}", self._tone(sign)) for kind in kinds]
        if rng.random() < CLOSED:
            sentences.append(self.write("{closing}", _Tone(sign, 1.0, 1.0)))
        return sentences

    def _tone(self, sign: int) -> _Tone:
        return _Tone(sign if self.rng.random() > OFF_TONE else -sign, 1.0, 1.0)

    def write(self, template: str, tone: _Tone) -> tuple[str, str]:
        """Expand a template; returns the text and the frame (rules spelt out, slots still {named})."""
        texts, frames = [], []
        for part, flags in _parts(template):
            if flags is None:
                text = frame = part
            else:
                text, frame = self._slot(part, tone.shade(flags))
            texts.append(text)
            frames.append(frame)
        return "".join(texts), "".join(frames)

    def _slot(self, name: str, tone: _Tone) -> tuple[str, str]:
        pick = self._fresh if name in NEVER_TWICE else self.rng.choice
        if options := lex.FRAMES.get(name):
            return self.write(pick(options), tone)
        if options := self.words.get(name):
            text, frame = self.write(pick(options), tone)
            return text, frame if name in ("own_opener", "own_fact") else f"{{{name}}}"
        if name in lex.WHOLE and tone.sign != self.sign:
            raise _Stuck
        if valences := self.phrases.get(name):
            return self._opinion(valences, tone), f"{{{name}}}"
        return getattr(self, f"_slot_{name}")(tone), f"{{{name}}}"

    def _fresh(self, options: Iterable[str]) -> str:
        """An option that this review has not used yet."""
        unused = [option for option in options if option not in self.used]
        if not unused:
            raise _Stuck
        self.used.add(option := self.rng.choice(unused))
        return option

    def _opinion(
        self, valences: dict[str, float], tone: _Tone, factor: float = 1.0, forms: dict[str, str] | None = None
    ) -> str:
        """Pick an unused expression that has the tone once factor and scope are applied, and record it."""
        sign = tone.sign if factor * tone.scope > 0 else -tone.sign
        lexeme = self._fresh([lexeme for lexeme, value in valences.items() if value * sign > 0])
        value = lex.clip(valences[lexeme] * factor * tone.scope)
        self.opinions.append(lex.Opinion(lexeme, value, tone.weight))
        return self._in_person((forms or {}).get(lexeme, lexeme))

    def _in_person(self, text: str) -> str:
        return text.format(**self.person)

    # Nouns: the aspect picked last decides the number and the fitting words of what follows.

    def _slot_aspect(self, tone: _Tone) -> str:
        return self._take(self.aspects)

    def _slot_peer(self, tone: _Tone) -> str:
        """A second aspect of the same kind, so that one adjective suits both."""
        kind = self.aspect.kind
        peers = [aspect for aspect in self.aspects if aspect.kind == kind and aspect.noun not in self.used]
        noun = self._take(peers or self.aspects)
        if not peers:
            self.aspect = self.aspect._replace(kind="any")
        return noun

    def _take(self, aspects: Iterable[lex.Aspect]) -> str:
        by_noun = {aspect.noun: aspect for aspect in aspects}
        self.aspect = by_noun[self._fresh(by_noun)]
        return self.aspect.noun

    def _slot_target(self, tone: _Tone) -> str:
        """What one can love or hate; nobody adores a price."""
        return self._take(aspect for aspect in self.aspects if aspect.kind != "price")

    def _slot_was(self, tone: _Tone) -> str:
        return "were" if self.aspect.plural else "was"

    # Adjectives, bare or behind a word that scales or turns them.

    def _slot_plainadj(self, tone: _Tone) -> str:
        return self._opinion(self._adjectives(), tone)

    def _slot_adj(self, tone: _Tone) -> str:
        return self._adjective(tone, lambda negator: True)

    def _slot_graded(self, tone: _Tone) -> str:
        """As {adj}, where a "not" would be awkward: "it seemed far from good", never "it seemed not good"."""
        return self._adjective(tone, lambda negator: not negator.startswith(("not", "by")))

    def _adjectives(self) -> dict[str, float]:
        own = lex.ADJECTIVES[self.aspect.kind]
        return own if self.rng.random() < OWN_WORDS else lex.ADJECTIVES["any"]

    def _adjective(self, tone: _Tone, suits: Callable[[str], bool]) -> str:
        draw, adjectives = self.rng.random(), self._adjectives()
        if draw < NEGATED:
            negators = lex.NEGATORS_OF_FAULTS if tone.sign > 0 else lex.NEGATORS_OF_PRAISE
            negator = self.rng.choice([negator for negator in negators if suits(negator)])
            return f"{negator} {self._opinion(adjectives, tone, negators[negator])}"
        if draw < NEGATED + SCALED:
            return self._scaled(adjectives, tone, softened=tone.sign < 0 and self.rng.random() < 0.4)
        return self._opinion(adjectives, tone)

    def _scaled(self, adjectives: dict[str, float], tone: _Tone, softened: bool = False) -> str:
        """An intensifier and an adjective of fitting strength: "absolutely superb", "a bit slow"."""
        extreme = not softened and self.rng.random() < 0.3
        scales = lex.SOFTENERS if softened else lex.EXTREME_INTENSIFIERS if extreme else lex.INTENSIFIERS
        fitting = {word: value for word, value in adjectives.items() if (abs(value) >= lex.EXTREME) == extreme}
        scale = self.rng.choice(sorted(scales))
        return f"{scale} {self._opinion(fitting, tone, scales[scale])}"

    def _slot_bare(self, tone: _Tone) -> str:
        """An aspect with its adjective in front, and no article."""
        return self._before_noun(tone, SCALED)

    def _before_noun(self, tone: _Tone, scaled: float) -> str:
        noun, adjectives, draw = self._slot_aspect(tone), self._adjectives(), self.rng.random()
        if draw >= scaled:
            return f"{self._opinion(adjectives, tone)} {noun}"
        scale = self.rng.choice(lex.BEFORE_NOUN)
        gradable = {word: value for word, value in adjectives.items() if abs(value) < lex.EXTREME}
        return f"{scale} {self._opinion(gradable, tone, lex.INTENSIFIERS[scale])} {noun}"

    def _slot_attr(self, tone: _Tone) -> str:
        """As {bare}, with "a" or "an" where the noun takes one."""
        return self._with_article(self._before_noun(tone, SCALED))

    def _slot_exclaimed(self, tone: _Tone) -> str:
        """As {attr}, with the adjective alone: "What a fairly good plot!" would be no exclamation."""
        return self._with_article(self._before_noun(tone, 0.0))

    def _with_article(self, phrase: str) -> str:
        if self.aspect.plural or self.aspect.mass:
            return phrase
        return f"{'an' if phrase[0] in 'aeiou' and not phrase.startswith('use') else 'a'} {phrase}"

    # Verbs.

    def _slot_felt_so(self, tone: _Tone) -> str:
        return self._verb(lex.LIKINGS, tone)

    def _slot_did_so(self, tone: _Tone) -> str:
        own = lex.DOINGS.get(self.aspect.kind, ())
        return self._verb(own if own and self.rng.random() < OWN_WORDS else lex.DOINGS["any"], tone)

    def _verb(self, verbs: tuple[tuple[str, str, float], ...], tone: _Tone) -> str:
        """A verb in the past: "loved", "really loved", "did not love", "never loved"."""
        draw, valences = self.rng.random(), {past: value for past, _, value in verbs}
        bases = {past: base for past, base, _ in verbs if base}
        flexible = {past: valences[past] for past in bases}
        if draw < NEGATED:
            negator = self.rng.choice(list(lex.VERB_NEGATORS))
            forms = bases if negator == "did not" else None
            return f"{negator} {self._opinion(flexible, tone, lex.VERB_NEGATORS[negator], forms)}"
        if draw < NEGATED + SCALED / 2 and verbs is lex.LIKINGS:
            scale = self.rng.choice(list(lex.VERB_MODIFIERS))
            return f"{scale} {self._opinion(flexible, tone, lex.VERB_MODIFIERS[scale])}"
        return self._opinion(valences, tone)
