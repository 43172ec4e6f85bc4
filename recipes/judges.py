"""Programmatic judges: functions of (prompt, answer) that return a score; a higher one is better.

Name one in params.yaml as `recipes.judges:FUNCTION` (judge.kind: callable), and write your own here.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from rankwise.fingerprint import file_digest
from rankwise.types import UserError

SOURCE = Path("data/source")
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


@functools.cache
def _imdb_classifier(path: Path = SOURCE / "imdb" / "validation.parquet"):
    """TF-IDF (1- and 2-grams) with logistic regression on the validation reviews, which train nothing else."""
    import pandas as pd
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    if not path.is_file():
        raise UserError(f"{path}: missing; link the IMDb folder with python -m tasks.recipe recipes/imdb.yaml --data …")
    table = pd.read_parquet(path, columns=["text", "label"])
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    return make_pipeline(vectors, LogisticRegression(C=10.0, max_iter=1000)).fit(table["text"], table["label"])


def imdb_sentiment(prompt: str, answer: str) -> float:
    """Log-odds that a review is positive, by a bag of words: another kind of judge than a language model."""
    return float(_imdb_classifier().decision_function([prompt + answer])[0])


imdb_sentiment.identity = lambda: file_digest(SOURCE / "imdb" / "validation.parquet")
