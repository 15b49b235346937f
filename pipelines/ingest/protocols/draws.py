"""Draws that anyone can repeat: images are taken in the order of the sha256 of `<seed>:<key>`.

The seed is a text that belongs to a data set, not `ingest.seed`: a protocol is the same split for everyone. A data set
has one order, so its protocols with the same shares have the same queries and training images.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence


def draw_parts(keys: Sequence[str], labels: Sequence[str], shares: Mapping[str, int], seed: str) -> list[str]:
    """Return the part of each image: the first images of each class fill the first of `shares`, and so on.

    `shares` are the numbers of images of one class. Images that are left go to `database`.
    """
    seats = [part for part, share in shares.items() for _ in range(share)]
    parts = ["database"] * len(keys)
    taken: Counter[str] = Counter()
    for place in _ordered(keys, seed):
        label = labels[place]
        if taken[label] < len(seats):
            parts[place] = seats[taken[label]]
            taken[label] += 1
    return parts


def fill_parts(keys: Sequence[str], labels: Sequence[Sequence[str]], shares: Mapping[str, int], seed: str) -> list[str]:
    """Return the part of each image with several labels; `shares` are the seats of each class in each part.

    Each image takes a free seat of the first of its labels that has one, in the first part where one is free. An image
    without a seat goes to `database`. So each class has at least its share in each part, if there are enough images.
    """
    parts = ["database"] * len(keys)
    taken: Counter[tuple[str, str]] = Counter()
    for place in _ordered(keys, seed):
        seats = ((label, part) for label in labels[place] for part in shares)
        seat = next((seat for seat in seats if taken[seat] < shares[seat[1]]), None)
        if seat is not None:
            taken[seat] += 1
            parts[place] = seat[1]
    return parts


def _ordered(keys: Sequence[str], seed: str) -> list[int]:
    return sorted(range(len(keys)), key=lambda place: hashlib.sha256(f"{seed}:{keys[place]}".encode()).digest())
