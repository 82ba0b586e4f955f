"""Clusters of near-duplicates against the definition, computed the long way."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from embed_pipeline.cleaning.near_duplicates import jaccard, near_duplicate_clusters, shingle_hashes
from embed_pipeline.settings import NearDuplicateSettings

ALPHABETS = {"latin": "abcdefghij klmnopqrst uvwxyz ", "chinese": "的一是在不了有和人这中大为上个国我以要他"}


def brute_force(texts: list[str], settings: NearDuplicateSettings) -> list[int]:
    size = settings.shingle_characters
    keys = [re.sub(r"[\W_]+", "", text.lower()) for text in texts]
    sets = [{key[i : i + size] for i in range(len(key) - size + 1)} for key in keys]
    labels = list(range(len(texts)))
    for right in range(len(texts)):
        for left in range(right):
            if len(sets[left] & sets[right]) >= settings.threshold * len(sets[left] | sets[right]):
                old, new = max(labels[left], labels[right]), min(labels[left], labels[right])
                labels = [new if label == old else label for label in labels]
    return labels


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_clusters_are_the_connected_components(alphabet: str) -> None:
    draw = random.Random(3)
    settings = NearDuplicateSettings(threshold=0.7)
    texts = []
    for _ in range(30):
        text = "".join(draw.choices(ALPHABETS[alphabet], k=300))
        texts.append(text)
        for _ in range(draw.randrange(4)):
            at = draw.randrange(250)
            text = text[:at] + "".join(draw.choices(ALPHABETS[alphabet], k=draw.randrange(1, 5))) + text[at + 3 :]
            texts.append(text)
    draw.shuffle(texts)
    assert near_duplicate_clusters(texts, settings).tolist() == brute_force(texts, settings)


def test_short_texts_are_told_apart_by_case_and_punctuation() -> None:
    texts = ["ls -l", "ls -L", "ls l", "ls -l"]
    assert near_duplicate_clusters(texts, NearDuplicateSettings()).tolist() == [0, 1, 2, 0]


def test_case_punctuation_and_spaces_do_not_count_in_longer_texts() -> None:
    text = "Reset your password, then sign in again with the new one."
    assert near_duplicate_clusters([text, text.upper().replace(",", " -")], NearDuplicateSettings()).tolist() == [0, 0]


def test_hashed_shingles_keep_the_exact_similarity() -> None:
    left, right = "abcdefghij", "abcdefghxyz"
    a, b = ({text[i : i + 5] for i in range(len(text) - 4)} for text in (left, right))
    assert jaccard(shingle_hashes(left, 5), shingle_hashes(right, 5)) == pytest.approx(len(a & b) / len(a | b))
    assert len(shingle_hashes("ab", 5)) == 1
    assert np.array_equal(shingle_hashes("", 5), shingle_hashes("", 5))
