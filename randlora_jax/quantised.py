"""Quantised arrays: qwix's `QArray`, codes and the scale of each tile of them, as one leaf.

qwix itself, an extra of this package, is imported where such an array is made or read, and known
by its attributes elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

PARTS = ("qvalue", "scale", "zero_point")  # of a QArray; the last can be None


def is_quantised(leaf: Any) -> bool:
    """Whether it is a QArray, or qwix's box around one."""
    return all(hasattr(without_box(leaf), name) for name in PARTS)


def without_box(leaf: Any) -> Any:
    """What qwix's `WithAux` holds, which `qwix.quantize_params` puts around arrays."""
    return leaf.array if hasattr(leaf, "how") and hasattr(leaf, "array") else leaf


def codes(leaf: Any) -> Any:
    """The codes of a quantised array, or any other leaf: what says how it is divided and stored.

    Where boxes of Flax name axes, those of the codes are in one.
    """
    if isinstance(leaf, meta.AxisMetadata) and is_quantised(leaf.unbox()):
        return leaf.replace_boxed(codes(leaf.unbox()))
    return without_box(leaf).qvalue if is_quantised(leaf) else leaf


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


def quantised_like(leaf: Any, value: jax.Array) -> Any:
    """Other values, quantised as an array is: to its type, in its tiles, its scales' dtype."""
    import qwix

    leaf = without_box(leaf)
    sizes = enumerate(zip(leaf.shape, leaf.scale.shape, strict=True))
    tiles: Mapping[int, int] = {i: n // count for i, (n, count) in sizes if count > 1}
    method = "absmax" if leaf.zero_point is None else "minmax"
    new = qwix.quantize(value, leaf.qtype, tiled_axes=tiles, calibration_method=method)
    return new.astype(leaf.scale.dtype)
