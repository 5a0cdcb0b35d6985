"""Topics for texts that came without: k-means clusters of TF-IDF vectors, named by their words.

A stand-in: a split by topic then holds out texts with other words, not a topic that somebody chose.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

MAX_TOPICS, PER_TOPIC = 24, 3  # at least so many different texts a topic, on average


def topics(texts: Sequence[str], *, seed: int = 0) -> list[str]:
    """A topic for each text, such as "03 garden roses"; equal texts share one. Less than 6 with other words are one."""
    different = sorted(set(texts))
    count = min(MAX_TOPICS, len({frozenset(_words(text)) for text in different}) // PER_TOPIC)
    if count < 2:
        return ["all"] * len(texts)
    analyzer: Any = _words
    tfidf = TfidfVectorizer(analyzer=analyzer)
    vectors: Any = tfidf.fit_transform(different)
    starts: Any = 4
    clusters = KMeans(count, n_init=starts, random_state=seed)
    labels = clusters.fit_predict(vectors)
    terms = tfidf.get_feature_names_out()
    heaviest = np.argsort(-clusters.cluster_centers_, axis=1, kind="stable")[:, :2]
    names = [f"{i:02d} {' '.join(terms[at])}" for i, at in enumerate(heaviest, 1)]
    named = {text: names[label] for text, label in zip(different, labels, strict=True)}
    return [named[text] for text in texts]


def _words(text: str) -> list[str]:
    """The words of a text that can tell its topic; all of it where there are none."""
    words = [word for word in re.findall(r"[^\W\d_]{2,}", text.lower()) if word not in ENGLISH_STOP_WORDS]
    return words or [text.lower()]
