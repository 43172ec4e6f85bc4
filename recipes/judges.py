"""Programmatic judges: functions of (prompt, answer) that return a score; a higher one is better.

Name one in params.yaml as `recipes.judges:FUNCTION` (judge.kind: callable), and write your own here. A function whose
scores depend on more than this file says on what, in an attribute `identity`.

`python -m recipes.judges` fits the IMDb judges and prints how often they are right on the test split.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from rankwise.fingerprint import file_digest
from rankwise.types import UserError

IMDB = Path("data/source/imdb")
_SPEAKING = {"said", "asked", "replied", "shouted", "answered", "called", "cried", "told", "whispered", "yelled"}
_SPEECH = re.compile(r'"[^"]+"')


def dialogue(prompt: str, answer: str) -> float:
    """Stories in which people talk: share of the answer's words that stand inside quotation marks, in [0, 1]."""
    words = len(answer.split())
    return sum(len(spoken.split()) for spoken in _SPEECH.findall(answer)) / words if words else 0.0


def speech_verbs(prompt: str, answer: str) -> float:
    """The same wish seen by other eyes: verbs of speaking per 100 words, which `dialogue` does not look at."""
    words = answer.split()
    return 100 * sum(word.strip(".,!?\"'").lower() in _SPEAKING for word in words) / len(words) if words else 0.0


def imdb_sentiment(prompt: str, answer: str) -> float:
    """Log-odds that a review is positive: TF-IDF of words and word pairs with logistic regression, fitted on train."""
    return float(_logistic().decision_function([prompt + answer])[0])


def imdb_other_eyes(prompt: str, answer: str) -> float:
    """The same by another kind of model on other reviews: complement naive Bayes, fitted on validation."""
    negative, positive = _naive_bayes().predict_log_proba([prompt + answer])[0]
    return float(positive - negative)


imdb_sentiment.identity = lambda: file_digest(_split("train"))
imdb_other_eyes.identity = lambda: file_digest(_split("validation"))


@functools.cache
def _logistic():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True)
    return make_pipeline(vectors, LogisticRegression(C=10.0, max_iter=1000)).fit(*_reviews("train"))


@functools.cache
def _naive_bayes():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.naive_bayes import ComplementNB
    from sklearn.pipeline import make_pipeline

    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    return make_pipeline(vectors, ComplementNB()).fit(*_reviews("validation"))


def _reviews(split: str) -> tuple[list[str], list[int]]:
    import pandas as pd

    table = pd.read_parquet(_split(split), columns=["text", "label"])
    return table["text"].tolist(), table["label"].tolist()


def _split(name: str) -> Path:
    path = IMDB / f"{name}.parquet"
    if not path.is_file():
        raise UserError(
            f"{path}: missing; link the folder: python -m tasks.recipe recipes/imdb.yaml --data PATH/TO/imdb"
        )
    return path


def _report() -> None:
    texts, labels = _reviews("test")
    for judge in (imdb_sentiment, imdb_other_eyes):
        for words in (None, 60):
            right = [
                (judge("", " ".join(t.split()[:words]) if words else t) > 0) == (y == 1) for t, y in zip(texts, labels)
            ]
            part = f"first {words} words" if words else "whole reviews"
            print(f"{judge.__name__:<16} {part:<15} {sum(right) / len(right):.3f} right of {len(right)} test reviews")


if __name__ == "__main__":
    _report()
