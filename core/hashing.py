"""Stable 64-bit hashes: the one source of order and randomness, so that nothing depends on who asks, or when."""

import hashlib

import numpy as np

_MASK = (1 << 64) - 1


def mix64(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of the 64-bit integers."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def hash_text(text: str) -> int:
    """64 bits of BLAKE2b, the same on every machine and Python (unlike `hash`)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def hash_of(*parts: int | str) -> int:
    """One 64-bit hash of integers (negative ones too) and strings, in order."""
    h = 0
    for part in parts:
        h = mix64(h ^ (hash_text(part) if isinstance(part, str) else part & _MASK))
    return h


def mix64_array(x: np.ndarray) -> np.ndarray:
    """`mix64` of a uint64 array, element by element."""
    x = x.astype(np.uint64, copy=True)
    x += np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
