"""What a checkpoint notes of each array: dtype, shape, and 64 bits that depend on every bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from randlora_jax import trees


def fingerprints(tree: trees.Tree) -> dict[str, str]:
    """By path: dtype, shape and 64 bits that depend on every bit and its place.

    Exact, and the same however the arrays are sharded.
    """
    return {
        name_of(path): f"{shape_of(leaf)}:" + "".join(f"{int(half):08x}" for half in _sums(leaf))
        for path, leaf in trees.items(tree)
    }


def name_of(path: trees.Path) -> str:
    """What a checkpoint calls an array."""
    return "/".join(path)


def shape_of(array: Any) -> str:
    """Its dtype and shape, how a fingerprint begins."""
    return f"{np.dtype(array.dtype)}{list(array.shape)}"


def check_dtypes(arrays: trees.Tree) -> None:
    """Raises a ValueError for an array that can't be saved, or that would be read as another."""
    for path, leaf in trees.items(arrays):
        name = f"{trees.dotted(path)!r} is {leaf.dtype}"
        try:
            tensorstore.dtype(np.dtype(leaf.dtype))  # what Orbax writes with
        except (TypeError, ValueError):
            raise ValueError(
                f"{name}, which Orbax can't save: cast it to a dtype that it can, or leave its "
                "module out of modules_to_save"
            ) from None
        taken = jax.dtypes.canonicalize_dtype(leaf.dtype)
        if taken != leaf.dtype and not isinstance(leaf, jax.Array):
            raise ValueError(
                f"{name} and NumPy's, which JAX takes as {taken}: give jnp.asarray of it, or set "
                "jax_enable_x64"
            )


@jax.jit
def _sums(array):
    words = _words(array).reshape(-1)
    place = jax.lax.iota(jnp.uint32, words.size)

    def mixed(multiplier):  # odd multipliers and shifts: no two words of one place collide
        x = (words ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(multiplier)
        x = (x ^ (x >> 15)) * jnp.uint32(0x2C1B3C6D)
        return jnp.sum(x ^ (x >> 12), dtype=jnp.uint32)

    return mixed(0x85EBCA6B), mixed(0xC2B2AE35)


def _words(array):
    """All of an array's bits, in words of 32: two for a number of 64, one for a smaller one."""
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag], axis=-1)
    if array.dtype == bool:
        return array.astype(jnp.uint32)
    bits = {
        2: jnp.uint2,
        4: jnp.uint4,
        8: jnp.uint8,
        16: jnp.uint16,
        32: jnp.uint32,
        64: jnp.uint32,
    }[jax.dtypes.itemsize_bits(array.dtype)]
    return jax.lax.bitcast_convert_type(array, bits).astype(jnp.uint32)
