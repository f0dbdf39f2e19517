"""How alike two pictures are, to the eye and in meaning. Also how much there is to see in one."""

import numpy as np
from PIL import Image


def detail(image: Image.Image) -> tuple[float, float]:
    """Entropy of the gray values in bits, and the share of pixels at an edge. There the gray
    differs from a neighbour's by over 1/8 of the range."""
    gray = image.convert("L")
    values = np.asarray(gray, dtype=np.int16)
    changed = np.zeros(values.shape, dtype=bool)
    changed[:, 1:] |= np.abs(np.diff(values, axis=1)) > 32
    changed[1:] |= np.abs(np.diff(values, axis=0)) > 32
    return abs(gray.entropy()), float(changed.mean())  # -0.0 of a plain picture


HASH_SIDE = 64
_PLACES = np.arange(HASH_SIDE)
_COSINES = np.cos(np.pi * np.arange(16)[:, None] * (2 * _PLACES + 1) / (2 * HASH_SIDE))  # (16, 64)


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """(4,) uint64, the perceptual hash. The picture is made gray and shrunk to 64 x 64. A bit says
    whether one of its 255 lowest frequencies is over their median. Scaling, compression and
    brightness hardly change it."""
    small = image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)
    frequencies = (_COSINES @ np.asarray(small) @ _COSINES.T).ravel()[1:]  # without the mean
    bits = np.append(frequencies > np.median(frequencies), False)
    return np.packbits(bits).view(np.uint64)


def hash_distances(hashes: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(n,) bits in which each of n hashes, (4, n), differs from another, (4,): 255 at most."""
    return sum(np.bitwise_count(row ^ word) for row, word in zip(hashes, other))  # uint8


def near_duplicates(hashes: np.ndarray, max_distance: int) -> list[tuple[int, int | None]]:
    """For each of (n, 4) hashes in turn: the nearest of those that stay before it, and the
    distance. (-1, None) for the first. A hash stays if it is farther than `max_distance` from all
    that do. The work grows as n * n."""
    nearest: list[tuple[int, int | None]] = []
    stay, kept = np.empty(hashes.T.shape, dtype=np.uint64), []
    for place, own in enumerate(hashes):
        distances = hash_distances(stay[:, : len(kept)], own)
        first = int(distances.argmin()) if kept else -1
        nearest.append((kept[first], int(distances[first])) if kept else (-1, None))
        if not kept or distances[first] > max_distance:
            stay[:, len(kept)] = own
            kept.append(place)
    return nearest


def semantic_duplicates(vectors: np.ndarray, max_similarity: float, clusters: int = 0,
                        seed: int = 0) -> list[tuple[int, float | None]]:
    """For each of n vectors of length 1: the nearest of those that stay before it in its cluster,
    and their cosine. (-1, None) for a cluster's first.

    There are `clusters` of them, or one for every 1,000 vectors. In each, those farthest from the
    centre come first, and so stay, as in SemDeDup: they are its rarest.
    """
    clusters = min(clusters or -(-len(vectors) // 1000), len(vectors))
    labels, centres = k_means(vectors, clusters, seed)
    nearest: list[tuple[int, float | None]] = [(-1, None)] * len(vectors)
    for cluster, centre in enumerate(centres):
        members = np.flatnonzero(labels == cluster)
        stay: list[int] = []
        for place in members[np.argsort(vectors[members] @ centre, kind="stable")]:
            cosines = vectors[stay] @ vectors[place]
            if stay:
                nearest[place] = (stay[int(cosines.argmax())], round(float(cosines.max()), 4))
            if not stay or nearest[place][1] <= max_similarity:
                stay.append(int(place))
    return nearest


def k_means(vectors: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) and centres (count, d) of length 1, by the cosine, after 20 rounds."""
    rng = np.random.default_rng(seed)
    centres = vectors[rng.choice(len(vectors), count, replace=False)]
    for _ in range(20):
        labels = (vectors @ centres.T).argmax(1)
        sums = np.zeros_like(centres)
        np.add.at(sums, labels, vectors)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), centres)
    return (vectors @ centres.T).argmax(1), centres
