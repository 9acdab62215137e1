"""Keyed 64-bit hashes, from which every shuffle and every draw is made: numpy's own may change."""

import hashlib
import json

import numpy as np

# -- the order of rows -------------------------------------------------------------------------------------

def stream_key(*parts):
    return np.uint64(int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little"))


def splitmix64(x):
    """splitmix64's finaliser: uint64 array to uint64 array. Ours to keep: numpy's own shuffles may change
    with a release."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hashed(k, *key):
    """A uint64 hash of each of an array of whole numbers, other for every key."""
    with np.errstate(over="ignore"):
        return splitmix64(stream_key(*key) + k.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


# -- one record a prompt -----------------------------------------------------------------------------------

def shuffle_key(*parts):
    """A 64-bit hash. Sorted by key(seed, id), records are shuffled whatever order they came in."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "big")
