"""Quantised arrays: qwix's `QArray`, codes and the scale of each tile of them, as one leaf.

qwix itself, an extra of this package, is imported where such an array is made or read, and known
by its attributes elsewhere.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from randlora_jax.placement import automatic

PARTS = ("qvalue", "scale", "zero_point")  # of a QArray; the last can be None


def without_box(leaf: Any) -> Any:
    """A QArray without the box that holds it: qwix's `WithAux`, or one of Flax's."""
    if isinstance(leaf, meta.Partitioned):
        return leaf.value if is_quantised(leaf.value) else leaf
    return leaf.array if hasattr(leaf, "how") and hasattr(leaf, "array") else leaf


def is_quantised(leaf: Any) -> bool:
    """Whether it is a QArray, or a box around one."""
    return all(hasattr(without_box(leaf), name) for name in PARTS)


def codes(leaf: Any) -> Any:
    """The codes of a quantised array, or any other leaf: what says how it is divided and stored.

    Where a box of Flax's names axes, the codes are in such a one.
    """
    if not is_quantised(leaf):
        return leaf
    array = without_box(leaf).qvalue
    return leaf.replace(value=array) if isinstance(leaf, meta.Partitioned) else array


def wrapped_by_qwix(cls: type) -> bool:
    """Whether a model's class is one that `qwix.quantize_model` has made of the user's."""
    return hasattr(cls, "_unquantized_type")


def floats(leaf: Any) -> Any:
    """An array as it is, or the floats of a quantised one: of its scale's dtype."""
    if not is_quantised(leaf):
        return leaf
    leaf = without_box(leaf)
    make = functools.partial(dequantised, levels=levels_of(leaf))
    return automatic(make, leaf.qvalue)(leaf.qvalue, leaf.scale, leaf.zero_point)


def dequantised(
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    levels: tuple[float, ...] | None = None,
) -> jax.Array:
    """What `qwix.dequantize` gives, to the last bit.

    qwix's own makes one row of an nf4 array, which devices would have to gather, and has an array
    for a constant, which can't be in a function that the compiler divides.

    Args:
      levels: what each code stands for, if that is not itself.
    """
    if levels is not None:
        table = jnp.stack([jnp.float32(level) for level in levels])
        codes = table[codes.astype(jnp.int32)]
    values = codes.astype(scale.dtype)
    if zero_point is not None:
        values = _by_tiles(operator.sub, values, zero_point.astype(scale.dtype))
    return _by_tiles(operator.mul, values, scale)


def _by_tiles(function: Callable[..., jax.Array], array: jax.Array, beside: jax.Array) -> jax.Array:
    """A function of an array's numbers, and of that which each one's tile has beside it."""
    pairs = [*zip(beside.shape, array.shape, strict=True)]
    tiles = (part for count, size in pairs for part in (count, size // count))
    each = (part for count, _ in pairs for part in (count, 1))
    return function(array.reshape(*tiles), beside.reshape(*each)).reshape(array.shape)


def levels_of(array: Any) -> tuple[float, ...] | None:
    """What the codes of a QArray stand for, where that is not themselves, as of nf4."""
    named = isinstance(array.qtype, str)  # one of qwix's own types
    return _levels(array.qtype) if named and array.qvalue.dtype == jnp.uint4 else None


@functools.cache
def _levels(qtype: str) -> tuple[float, ...]:
    import qwix  # it is there, where a QArray is

    with jax.ensure_compile_time_eval():
        every = jnp.arange(16).astype(jnp.uint4)
        return tuple(qwix.dequantize(qwix.QArray(every, jnp.ones(16), qtype=qtype)).tolist())


def type_of(leaf: Any) -> str:
    """What a quantised array is made of, as "nf4, 64 x 1": the type, and the sizes of its tiles."""
    leaf = without_box(leaf)
    name = leaf.qtype if isinstance(leaf.qtype, str) else jnp.dtype(leaf.qtype).name
    tiles = (n // count for n, count in zip(leaf.shape, leaf.scale.shape, strict=True))
    return f"{name}, {' x '.join(map(str, tiles))}"
