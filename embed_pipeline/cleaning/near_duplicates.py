"""Which passages say the same in almost the same words, in any language."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from embed_pipeline.cleaning.normalise import casefolded, drawn
from embed_pipeline.settings import NearDuplicateSettings

# Below this many letters and digits, letter case and punctuation can be all the difference (`ls -l`, `ls -L`).
SHORT_KEY = 40
# Missing a pair costs a leak, a needless candidate one exact comparison: so bands are chosen for few misses.
_LSH_WEIGHTS = (0.005, 0.995)  # false positives, false negatives: 99 % of pairs at a threshold of 0.85 are met
_NOT_WORD = re.compile(r"[\W_]+")


def near_duplicate_clusters(texts: Sequence[str], settings: NearDuplicateSettings) -> NDArray[np.int64]:
    """Label of each text's cluster, shape (len(texts),): the lowest index of a text in it.

    Two texts are linked when the Jaccard similarity of their sets of character shingles (lower case, without spaces and
    punctuation, so that it works for Chinese too) reaches `threshold`; clusters are the connected components.
    Candidates come from MinHash with locality-sensitive hashing (Broder 1997; Leskovec et al., Mining of Massive
    Datasets, ch. 3), so a pair near the threshold can be missed; every candidate is compared exactly.
    """
    # Not for whoever only asks whether something changed: the two take longer to import than that takes to answer.
    from datasketch import MinHash, MinHashLSH
    from scipy.cluster.hierarchy import DisjointSet

    keys = [_key(text) for text in texts]
    first: dict[str, int] = {}
    owner = [first.setdefault(key, index) for index, key in enumerate(keys)]
    clusters = DisjointSet(first.values())
    size = settings.shingle_characters
    index_of_pairs = MinHashLSH(threshold=settings.threshold, num_perm=settings.permutations, weights=_LSH_WEIGHTS)
    empty = MinHash(num_perm=settings.permutations, hashfunc=int, scheme="affine64")

    # A cluster's members come up again for its other members.
    @lru_cache(maxsize=10_000)
    def shingles(index: int) -> NDArray[np.uint64]:
        return shingle_hashes(keys[index], size)

    # An estimate this far below the threshold is five standard errors off: not worth the exact comparison.
    hopeless = settings.threshold - 5 * sqrt(settings.threshold * (1 - settings.threshold) / settings.permutations)
    signatures: dict[int, MinHash] = {}
    for index in tqdm(list(first.values()), desc="near-duplicates", unit="passage", delay=5, mininterval=1):
        signature = signatures[index] = empty.copy()
        signature.update_batch(shingles(index).tolist())
        for other in sorted(index_of_pairs.query(signature)):
            if clusters.connected(index, other) or signature.jaccard(signatures[other]) < hopeless:
                continue
            if jaccard(shingles(index), shingles(other)) >= settings.threshold:
                clusters.merge(index, other)
        index_of_pairs.insert(index, signature, check_duplication=False)

    label = {member: min(members) for members in clusters.subsets() for member in members}
    return np.fromiter((label[index] for index in owner), dtype=np.int64, count=len(texts))


def shingle_hashes(key: str, size: int) -> NDArray[np.uint64]:
    """Sorted distinct 64-bit hashes of the runs of `size` characters in `key` (of all of it, where it is shorter)."""
    characters = np.frombuffer(key.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64) + np.uint64(1)
    size = min(size, max(1, len(characters)))
    hashed = np.zeros(max(0, len(characters) - size + 1), dtype=np.uint64)
    for offset in range(size):
        hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + characters[offset : offset + len(hashed)]
    # splitmix64's mixing: MinHash needs all bits to vary
    hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.unique(hashed ^ (hashed >> np.uint64(31)))


def jaccard(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> float:
    """Jaccard similarity of two sorted arrays of distinct hashes."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / max(1, len(left) + len(right) - shared)


def _key(text: str) -> str:
    key = _NOT_WORD.sub("", casefolded(text))
    return key if len(key) >= SHORT_KEY else drawn(text)
