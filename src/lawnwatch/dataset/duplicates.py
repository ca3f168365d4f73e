"""Groups of pictures that show the same: equal bytes, resizings, near copies."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

NEAR_KEPT = 1_000
PAIRS_AT_ONCE = 1_000_000


def duplicate_groups(
    hashes: NDArray[np.uint64], distance: int, *, keep: int = NEAR_KEPT
) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
    """Which 64-bit perceptual hashes belong together, directly or by others in between.

    Args:
        hashes: (n,) uint64.
        distance: largest number of differing bits between two direct neighbours.

    Returns:
        (n,) int64, the smallest position of each one's group, and up to `keep` direct pairs of positions.
    """
    distinct, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    parent = np.arange(len(distinct))
    # Pictures of one hash are joined in a star, not pair by pair: blank ones would give millions of pairs.
    copies = np.flatnonzero(first[which] != np.arange(len(hashes)))[:keep]
    kept = np.stack([first[which[copies]], copies], axis=1)
    for pairs in near_pairs(distinct, distance):
        _join(parent, pairs[:, 0], pairs[:, 1])
        ends = np.sort(first[pairs], axis=1)
        kept = np.unique(np.concatenate([kept, ends]), axis=0)[:keep]
    smallest = np.full(len(distinct), len(hashes))
    np.minimum.at(smallest, parent[which], np.arange(len(hashes)))
    return smallest[parent[which]], [(int(one), int(other)) for one, other in kept]


def near_pairs(hashes: NDArray[np.uint64], distance: int) -> Iterator[NDArray[np.int64]]:
    """All pairs of positions whose 64-bit hashes differ in at most `distance` bits, as (k, 2) arrays with one < other.

    The 64 bits are cut into distance + 2 bands; two hashes that near agree in two bands at least, so only hashes that
    share two bands are compared (after Norouzi et al., "Fast search in Hamming space with multi-index hashing", CVPR
    2012). A pair that shares more comes more than once.
    """
    edges = np.linspace(0, 64, distance + 3).astype(int)
    bands = [((1 << int(high)) - 1) ^ ((1 << int(low)) - 1) for low, high in pairwise(edges)]
    for one, other in combinations(bands, 2):
        part = hashes & np.uint64(one | other)
        order = np.argsort(part, kind="stable")
        same, ordered = part[order], hashes[order]
        left = np.arange(len(hashes))
        found: list[NDArray[np.int64]] = []
        size = 0
        for step in range(1, len(hashes)):
            left = left[left + step < len(hashes)]
            left = left[same[left] == same[left + step]]
            if not len(left):
                break
            near = left[np.bitwise_count(ordered[left] ^ ordered[left + step]) <= distance]
            found.append(np.sort(np.stack([order[near], order[near + step]], axis=1), axis=1))
            size += len(near)
            if size > PAIRS_AT_ONCE:
                yield np.concatenate(found)
                found, size = [], 0
        if size:
            yield np.concatenate(found)


def _join(parent: NDArray[np.int64], one: NDArray[np.int64], other: NDArray[np.int64]) -> None:
    """Unite the sets of each pair, in place; afterwards every parent is the smallest member of its set."""
    while True:
        low, high = np.minimum(parent[one], parent[other]), np.maximum(parent[one], parent[other])
        apart = low != high
        if not apart.any():
            return
        one, other = one[apart], other[apart]
        np.minimum.at(parent, high[apart], low[apart])
        while not np.array_equal(parent, grand := parent[parent]):
            parent[:] = grand
