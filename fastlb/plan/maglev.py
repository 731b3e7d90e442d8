"""Maglev tables from backend keys (Eisenbud et al., NSDI 2016), built as Envoy builds them.

Anyone can reproduce a table: backends sorted by key; offset = XXH64(key) mod M;
skip = XXH64(key, seed 1) mod (M-1) + 1. Another ``seed`` means seeds ``seed`` and ``seed`` + 1. Keys, not positions
in a list, decide: reordering moves nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from weakref import WeakValueDictionary

from xxhash import xxh64_intdigest

from fastlb._core import MaglevTable

SEED_RANGE = 1 << 64

_shared: WeakValueDictionary[tuple[object, ...], MaglevTable] = WeakValueDictionary()


def is_prime(number: int) -> bool:
    """Return whether a number is a prime, by trial division; table sizes are below 2**21."""
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


@lru_cache(maxsize=1 << 12)
def _hashes(keys: tuple[str, ...], seed: int) -> bytes:
    """Return the offset hash and the skip hash of each key, as `MaglevTable` takes them: most of what a table costs."""
    other = (seed + 1) % SEED_RANGE
    pairs = ((xxh64_intdigest(key.encode(), seed), xxh64_intdigest(key.encode(), other)) for key in keys)
    return array("Q", chain.from_iterable(pairs)).tobytes()


def build_table(keys: Sequence[str], weights: Sequence[int], size: int, seed: int) -> MaglevTable | None:
    """Return the table of these backends, which come sorted by key; None when none of them has a weight.

    Tables are shared: as long as one with the same content is in use anywhere, it is not built again.
    """
    if not any(weights):
        return None
    content = (tuple(keys), tuple(weights), size, seed)
    table = _shared.get(content)
    if table is None:
        table = MaglevTable(_hashes(content[0], seed), array("I", weights).tobytes(), size)
        _shared[content] = table
    return table


def maglev_table(
    names: Sequence[str], weights: Sequence[int] | None = None, size: int = 65537, seed: int = 0
) -> array[int]:
    """Return the Maglev table of ``names``: ``size`` indices into ``names``.

    ``names``: unique backend keys, by convention ``address:port``, in any order. ``weights``: whole numbers from 0,
    one a name; 1 each when not given. ``size``: a prime above the number of names. ``seed``: 0..2**64-1.
    Raises ValueError when any of this does not hold.
    """
    if isinstance(names, str):
        raise TypeError("names must be a list of names, not one text")
    names = list(names)
    weights = [1] * len(names) if weights is None else list(weights)
    if len(weights) != len(names):
        raise ValueError(f"{len(names)} names but {len(weights)} weights")
    if len(set(names)) != len(names):
        raise ValueError("names must be unique")
    if any(not 0 <= weight < 1 << 32 for weight in weights):
        raise ValueError(f"weights must be in 0..{(1 << 32) - 1}")
    if not is_prime(size) or not len(names) <= size < 1 << 21:
        raise ValueError(f"size must be a prime of at least {len(names)} and below {1 << 21}, not {size}")
    if not 0 <= seed < SEED_RANGE:
        raise ValueError("seed must be in 0..2**64-1")
    order = sorted(range(len(names)), key=names.__getitem__)
    table = build_table([names[i] for i in order], [weights[i] for i in order], size, seed)
    if table is None:
        raise ValueError("at least one name needs a weight above 0")
    return array("H", [order[position] for position in memoryview(table.to_bytes()).cast("H")])
