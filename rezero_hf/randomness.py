"""Random numbers by position: permutations and draws that are functions of (key, index), with no state to save.

Whoever asks for position i gets the same, whether a run was interrupted, on how many processes it runs, and in which
order they ask. The arithmetic is that of unsigned 64-bit integers, on one Python integer or on a whole numpy array.
"""

import math
from functools import lru_cache
from typing import TypeVar

import numpy as np


Integers = TypeVar("Integers", int, np.ndarray)

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def permute(index: int, size: int, key: tuple[int, ...]) -> int:
    """Where a permutation of range(size) that `key` selects sends `index`: O(1) time and memory.

    A Feistel network over the next even power of two, applied again until the result is in range (cycle walking),
    which takes fewer than four rounds on average.
    """
    index = _feistel(index, size, key)
    while index >= size:
        index = _feistel(index, size, key)
    return index


def permutation(size: int, key: tuple[int, ...]) -> np.ndarray:
    """`permute` of every index: int64, shape (size,)."""
    order = _feistel(np.arange(size, dtype=np.uint64), size, key)
    while (outside := order >= size).any():
        order[outside] = _feistel(order[outside], size, key)
    return order.astype(np.int64)


def uniform(key: tuple[int, ...], indices: np.ndarray, number: int) -> np.ndarray:
    """Independent numbers in [0, 1) for each index: float64, shape (len(indices), number).

    Args:
        key: another key, other numbers.
        indices: whole numbers from 0, shape (n,).
        number: how many for each. The first ones do not depend on it.
    """
    states = _mix(np.asarray(indices, dtype=np.uint64) ^ _digest(key))
    bits = _mix(states[:, None] + np.arange(number, dtype=np.uint64) * _GOLDEN)
    return (bits >> 11) * 2.0**-53


def _feistel(index: Integers, size: int, key: tuple[int, ...]) -> Integers:
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    mask = (1 << half) - 1
    left, right = index >> half, index & mask
    for round_key in _round_keys(key):
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return left << half | right


@lru_cache(maxsize=64)
def _round_keys(key: tuple[int, ...], rounds: int = 6) -> tuple[int, ...]:
    state = _digest(key)
    return tuple(_mix(state + number) for number in range(1, rounds + 1))


def _digest(key: tuple[int, ...]) -> int:
    state = 0
    for part in key:
        state = _mix(state ^ _mix(part))
    return state


def _mix(value: Integers) -> Integers:
    """splitmix64: every bit of the result depends on every bit of the value."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31
