"""Keyed 64-bit hashes, from which every shuffle and every draw is made: numpy's own shuffles may change with
a release, so these are ours to keep.
"""

import hashlib
import json

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)                    # 2^64 / golden ratio: splitmix64's increment


def stream_key(*parts):
    """A key for hashed() and permuted(): uint64."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def splitmix64(x):
    """splitmix64's finaliser: uint64 array to uint64 array."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hashed(numbers, *key):
    """A uint64 hash of each of an array of whole numbers, other for every key."""
    with np.errstate(over="ignore"):
        return splitmix64(stream_key(*key) + numbers.astype(np.uint64) * GOLDEN)


def shuffle_key(*parts):
    """A 64-bit hash. Sorted by shuffle_key(seed, id), records are shuffled whatever order they came in."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
