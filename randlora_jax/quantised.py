"""Quantised arrays: qwix's `QArray`, codes and the scale of each tile of them, as one leaf.

qwix itself, an extra of this package, is imported where such an array is made or read, and known
by its attributes elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax.core import meta

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
    """An array as it is, or the floats of a quantised one, by qwix: of its scale's dtype."""
    if not is_quantised(leaf):
        return leaf
    import qwix

    return qwix.dequantize(without_box(leaf))


def map_parts(function: Callable[[str, Any], Any], leaf: Any) -> Any:
    """`function(name, array)` of each array of a leaf: "qvalue", "scale"; "" of an ordinary one."""
    if not is_quantised(leaf):
        return function("", leaf)
    leaf = without_box(leaf)
    parts = {name: getattr(leaf, name) for name in PARTS}
    new = {name: function(name, part) for name, part in parts.items() if part is not None}
    return dataclasses.replace(leaf, **new)


def type_of(leaf: Any) -> str:
    """What a quantised array is made of, as "nf4, 64 x 1": the type, and the sizes of its tiles.

    Of any other array, its dtype.
    """
    if not is_quantised(leaf):
        return str(jnp.dtype(leaf.dtype))
    leaf = without_box(leaf)
    name = leaf.qtype if isinstance(leaf.qtype, str) else jnp.dtype(leaf.qtype).name
    tiles = (n // count for n, count in zip(leaf.shape, leaf.scale.shape, strict=True))
    return f"{name}, {' x '.join(map(str, tiles))}"
