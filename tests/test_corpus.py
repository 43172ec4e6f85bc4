"""Laws of the embedded corpus: its variety, its neutral openings, and the reader that scores any text."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import FrozenInstanceError
from itertools import pairwise

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from rankwise import lexicon
from rankwise.corpus import CLEAR, WORD_RANGE, draft, ground_truth, opening, reviews
from rankwise.types import UserError

N = 6000


@pytest.fixture(scope="module")
def corpus():
    return reviews(N, seed=7)


@pytest.fixture(scope="module")
def drafts():
    return [draft(7, index) for index in range(N)]


def held_out_accuracy(model, texts, labels, trained_on):
    model.fit(texts[:trained_on], labels[:trained_on])
    return model.score(texts[trained_on:], labels[trained_on:])


# Writing -------------------------------------------------------------------------------------------------------------


def test_same_seed_same_corpus():
    assert reviews(40, seed=3) == reviews(40, seed=3)
    assert not {r.text for r in reviews(40, seed=3)} & {r.text for r in reviews(40, seed=4)}


def test_a_smaller_corpus_is_a_prefix_of_a_larger_one():
    assert reviews(41, seed=3)[:17] == reviews(17, seed=3)


def test_labels_are_balanced_at_any_size(corpus):
    positive = np.cumsum([1 if r.label == "positive" else -1 for r in corpus])
    assert abs(positive).max() <= 1


def test_label_is_the_sign_of_the_score_and_no_review_is_undecided(corpus):
    for review in corpus:
        assert (review.score > 0) == (review.label == "positive")
        assert CLEAR <= abs(review.score) < 1


def test_a_review_cannot_be_changed(corpus):
    with pytest.raises(FrozenInstanceError):
        corpus[0].label = "negative"


def test_texts_are_distinct(corpus):
    assert len({review.text for review in corpus}) >= 0.999 * N


def test_lengths_and_vocabulary_suit_a_small_model(corpus):
    lengths = [len(review.text.split()) for review in corpus]
    assert WORD_RANGE[0] <= min(lengths) and max(lengths) <= WORD_RANGE[1]
    vocabulary = {word for review in corpus for word in re.findall(r"[a-z'-]+", review.text.lower())}
    assert 600 <= len(vocabulary) <= 1200


def test_no_template_dominates(drafts):
    sentences = Counter(frame for d in drafts for frame in d.frames)
    assert sentences.most_common(1)[0][1] <= 0.03 * sentences.total()
    assert Counter(d.frames for d in drafts).most_common(1)[0][1] <= 0.03 * N


def test_no_pattern_of_function_words_dominates(drafts):
    """The same law without trusting the grammar's own slots: all but the 60 most frequent words are masked."""
    sentences = [s.lower() for d in drafts for s in re.split(r"(?<=[.!?]) ", d.text)]
    counts = Counter(word for s in sentences for word in re.findall(r"[a-z'-]+", s))
    frequent = {word for word, _ in counts.most_common(60)}
    masked = Counter(re.sub(r"[a-z'-]+", lambda m: m[0] if m[0] in frequent else "_", s) for s in sentences)
    assert masked.most_common(1)[0][1] <= 0.03 * len(sentences)


def test_reviews_are_mixed(drafts):
    against = [opinion.value * d.score < 0 for d in drafts for opinion in d.opinions]
    assert 0.15 <= np.mean(against) <= 0.25


def test_case_and_punctuation_are_natural(corpus):
    for review in corpus:
        assert re.fullmatch(r"[A-Z].*[.!]", review.text)
        assert not re.search(r"\{|\}|  | [.,;:!]|[.,;:!]{2}|[.!] [a-z]|\bi\b|\b([A-Za-z]+) \1\b", review.text), (
            review.text
        )
        assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeiou]", review.text), review.text


# Openings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [1, 4, 6, 8])
def test_an_opening_and_its_rest_are_the_text(corpus, words):
    for review in corpus[:200]:
        prompt, rest = opening(review.text, words)
        assert prompt + rest == review.text
        assert len(prompt.split()) == words and prompt[-1] != " " and rest[0] == " "


def test_openings_hold_no_opinion(corpus):
    assert all(ground_truth("", opening(review.text, 8)[0]) == 0.0 for review in corpus)


def test_openings_do_not_reveal_the_label(corpus):
    model = make_pipeline(CountVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=200))
    texts, labels = [opening(review.text, 6)[0] for review in corpus], [review.label for review in corpus]
    assert 0.42 < held_out_accuracy(model, texts, labels, trained_on=4000) < 0.58


def test_whole_texts_reveal_the_label_but_not_trivially(corpus):
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10, max_iter=200))
    texts, labels = [review.text for review in corpus], [review.label for review in corpus]
    assert 0.85 < held_out_accuracy(model, texts, labels, trained_on=3000) < 0.995


# Reading -------------------------------------------------------------------------------------------------------------


def test_ground_truth_reads_what_the_generator_meant(corpus):
    read = np.array([ground_truth("", review.text) for review in corpus])
    meant = np.array([review.score for review in corpus])
    assert np.mean((read > 0) == (meant > 0)) >= 0.995
    assert np.corrcoef(read, meant)[0, 1] > 0.97


def test_a_continuation_is_scored_like_its_review(corpus):
    for review in corpus[:500]:
        assert ground_truth(*opening(review.text, 8)) == pytest.approx(ground_truth("", review.text))


def test_ties_are_rare(corpus):
    counts = Counter(ground_truth("", review.text) for review in corpus)
    assert sum(c * (c - 1) for c in counts.values()) / (N * (N - 1)) < 0.03


def test_valences_lie_in_range_and_no_expression_is_neutral():
    phrases, _ = lexicon.known_phrases()
    values = [entry.value for entry in phrases.values() if entry.role == "opinion"]
    assert len(values) > 300 and all(0 < abs(value) <= 1 for value in values)


def test_one_opinion_is_halved_by_the_neutral_prior():
    """(1 * 0.92) / (1 + 1)"""
    assert ground_truth("", "The plot was superb.") == pytest.approx(0.46)


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ("The plot was dull.", -1),
        ("The plot was not dull.", 1),
        ("The plot was anything but dull.", 1),
        ("It wasn't a dull plot.", 1),
        ("The hotel was hardly charming.", -1),
        ("The hotel was not really a charming one.", -1),
        ("I did not enjoy the ending.", -1),
        ("I didn't like the ending.", -1),
        ("The pacing never dragged.", 1),
        ("Nothing about the meal was bland.", 1),
        ("Neither the soup nor the pie was tasty.", -1),
        ("At no point did the singer seem thrilling.", -1),
        ("I would not recommend it.", -1),
        ("The plot was not only clever.", 1),
    ],
)
def test_negation_flips(text, sign):
    assert ground_truth("", text) * sign > 0


def test_a_negated_extreme_is_milder_than_the_opposite():
    assert ground_truth("", "It was dreadful.") < ground_truth("", "It was not superb.") < 0


def test_negation_ends_with_its_clause():
    assert ground_truth("", "It was not long, and superb.") == ground_truth("", "It was long, and superb.")


@pytest.mark.parametrize(
    "ordered",
    [
        ("a bit dull", "dull", "very dull"),
        ("slightly rude", "rather rude", "rude", "far too rude"),
        ("not very good", "fairly good", "good", "very good"),
    ],
)
def test_intensifiers_scale(ordered):
    strengths = [abs(ground_truth("", f"It was {phrase}.")) for phrase in ordered]
    assert all(weaker < stronger for weaker, stronger in pairwise(strengths))


@pytest.mark.parametrize(
    "text",
    [
        "Although the soup was awful, the pie was superb.",
        "The soup was awful, but the pie was superb.",
        "The pie was superb, even though the soup was awful.",
        "Despite the awful soup, the pie was superb.",
    ],
)
def test_a_concession_weighs_half(text):
    """(0.92 - 0.5 * 0.86) / (1 + 1 + 0.5)"""
    assert ground_truth("", text) == pytest.approx(0.196)


def test_repetition_is_not_rewarded():
    once = ground_truth("", "The plot was superb.")
    assert ground_truth("", "The plot was superb. " * 9) == once
    assert ground_truth("", "superb superb superb really superb") == once


def test_length_is_not_rewarded():
    text = "The plot was superb, and the cast was lovely."
    assert ground_truth("", text + " We paid in cash." * 9) == ground_truth("", text)
    assert ground_truth("", text + " The ending was decent.") < ground_truth("", text + " The ending was great.")


def test_one_happy_word_does_not_beat_a_rich_review(corpus):
    strongest = max(ground_truth("", f"It was {word}.") for words in lexicon.ADJECTIVES.values() for word in words)
    rich = "The cast was superb, I loved the script, and the ending was brilliant. Do not miss it."
    assert ground_truth("", rich) > strongest


@pytest.mark.parametrize("text", ["", " ", "!!", "Zqx blorp 17 of of the", "not very", "é漢字 \U0001f600"])
def test_no_opinion_is_zero(text):
    assert ground_truth("", text) == 0.0


def test_broken_grammar_is_still_read():
    assert (
        ground_truth("", "plot plot superb the the of, GREAT cast?? and")
        > 0
        > ground_truth("", "meal of dull awful the")
    )


def test_the_prompt_is_context_and_is_not_scored():
    assert ground_truth("The meal was superb", " and I paid.") == 0.0
    assert ground_truth("The meal was not", " bland.") > 0 > ground_truth("The meal was", " bland.")
    assert ground_truth("The meal was del", "icious.") > 0


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "seed"), [(-1, 0), (2.5, 0), (True, 0), (3, "7"), (3, None)])
def test_bad_sizes_and_seeds_are_refused(n, seed):
    with pytest.raises(UserError, match=r"n=|seed="):
        reviews(n, seed)


@pytest.mark.parametrize("words", [0, -3, 4, 9, 2.5])
def test_an_opening_leaves_something_on_both_sides(words):
    with pytest.raises(UserError, match=f"words={words}"):
        opening("Just four words here.", words)


def test_a_text_cut_anywhere_is_read_without_an_error():
    """A model stops in mid-phrase: every prefix of a text has a score."""
    for review in reviews(40, seed=3):
        for end in range(len(review.text)):
            assert -1 < ground_truth("", review.text[:end]) < 1
