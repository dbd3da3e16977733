"""The random bases A and B: one pair for the whole model, drawn from `projection_prng_key`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax.config import RandLoraConfig
from randlora_jax.placement import has_values, placed_like, whole

Bases = dict[str, jax.Array]
SCALING = (
    "randlora_scaling"  # of a table of adapters, (capacity,): beside the bases, as they frozen
)

# Of the draw below: a checkpoint without bases names it, and another one would not restore.
GENERATOR = "threefry2x32/uniform23/v1"


def without_table(bases: Mapping[str, Any]) -> dict[str, Any]:
    """The bases alone, without what a table of adapters has beside them."""
    return {key: array for key, array in bases.items() if key != SCALING}


def num_bases(min_dim: int, r: int) -> int:
    """Number of bases that give a layer whose smaller side is `min_dim` full rank."""
    return -(-min_dim // r)


def check_rank(config: RandLoraConfig, bases: Mapping[str, Any]) -> None:
    """Raises a ValueError for a config of another r than the bases, and so the scales, have."""
    r = bases["randlora_A"].shape[0]
    if config.r != r:
        raise ValueError(
            f"the config has r={config.r}, but the scales and bases were made with r={r}: use the "
            "config that adapt was called with, or that load_adapter returned"
        )


def shared_dims(shapes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(max_dim, min_dim) that PEFT gives the bases of layers of the (in, out) `shapes`.

    The elementwise largest shape first, then the larger and the smaller of its two sides:
    (20, 100) and (50, 80) get (100, 50), and (20, 100) and (100, 20) get (100, 100).
    """
    sides = [max(side) for side in zip(*shapes, strict=True)]
    return max(sides), min(sides)


def read_dims(config: RandLoraConfig, shapes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(max_dim, min_dim) to draw for layers of the (in, out) `shapes`: what they read.

    That is the largest of their larger sides and of their smaller ones: (20, 100) and (100, 20)
    read (100, 20) of what PEFT draws. With `very_sparse` it is `shared_dims`, by whose smaller
    side PEFT gives all bases their density.
    """
    shapes = list(shapes)
    if config.very_sparse:
        return shared_dims(shapes)
    return max(map(max, shapes)), max(map(min, shapes))


def draw(
    config: RandLoraConfig, max_dim: int, min_dim: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> Bases:
    """Draws the bases for layers of up to `max_dim` by `min_dim`.

    Values have unit variance: uniform, or ternary where the config says `sparse` or
    `very_sparse`. A smaller pair with the same r is a prefix of a larger one (not with
    `very_sparse`, whose density depends on `min_dim`), each device of a sharded draw computes its
    own part, and CPU, GPU and TPU draw the same bits.

    Args:
      config: `r`, `projection_prng_key`, `sparse` and `very_sparse` count.
      max_dim, min_dim: as `read_dims` gives them; or `shared_dims`, for PEFT.
      dtype: of dense bases, which are drawn in float32 and cast last.

    Returns:
      `randlora_A` (r, 1, min_dim) and `randlora_B` (max_dim, num_bases, r). Ternary bases are
      int8 signs, with `randlora_scale`, float32 (2,): the sizes of A's and of B's entries.

    Example:
      >>> bases = draw(RandLoraConfig(r=4), max_dim=10, min_dim=6)
      >>> bases["randlora_A"].shape, bases["randlora_B"].shape
      ((4, 1, 6), (10, 2, 4))
    """
    seed = np.uint32(config.projection_prng_key & 0xFFFFFFFF)
    # The flag decides the stream and the prefix property: never the caller's setting.
    with jax.threefry_partitionable(True):
        key_a, key_b = jax.random.split(jax.random.key(seed, impl="threefry2x32"))
        uniform_a = jax.random.uniform(key_a, (min_dim, config.r), jnp.float32)
        one_basis = lambda b: jax.random.uniform(
            jax.random.fold_in(key_b, b), (max_dim, config.r), jnp.float32
        )
        bases = jnp.arange(num_bases(min_dim, config.r), dtype=jnp.uint32)
        uniform_b = jax.vmap(one_basis, out_axes=1)(bases)
    uniform_a = uniform_a.T[:, None, :]  # (r, 1, min_dim)
    probability = sign_probability(config, min_dim)
    if probability is None:
        # 2u - 1 is exact, so that one rounding is left and fused multiply-adds change nothing.
        dense = lambda u: (np.float32(math.sqrt(3)) * (2 * u - 1)).astype(dtype)
        return {"randlora_A": dense(uniform_a), "randlora_B": dense(uniform_b)}
    p = np.float32(probability)
    signs = lambda u: (u >= 1 - p).astype(jnp.int8) - (u < p).astype(jnp.int8)
    scale = np.float32(1 / math.sqrt(2 * probability))
    return {
        "randlora_A": signs(uniform_a),
        "randlora_B": signs(uniform_b),
        "randlora_scale": jnp.full((2,), scale),
    }


def resized(config: RandLoraConfig, bases: Mapping[str, Any], max_dim: int, min_dim: int) -> Bases:
    """Bases of other sizes, for layers that read what both have: what is new is as drawn."""
    A, B = bases["randlora_A"], bases["randlora_B"]
    if (B.shape[0], A.shape[2]) == (max_dim, min_dim):
        return dict(bases)
    drawn = draw(config, max_dim, min_dim, jnp.float32 if A.dtype == jnp.int8 else A.dtype)

    def put(old, new):
        part = tuple(slice(min(sizes)) for sizes in zip(old.shape, new.shape, strict=True))
        return new.astype(old.dtype).at[part].set(whole(old)[part])

    return {**bases, **{key: put(bases[key], drawn[key]) for key in ("randlora_A", "randlora_B")}}


def joined(config: RandLoraConfig, ours: Bases, added: Bases) -> Bases:
    """Bases that serve the layers of two pairs, which are parts of them; one of the two, if it can.

    Raises:
      ValueError: if they can't be parts of one pair.
    """
    sizes = [(b["randlora_B"].shape[0], b["randlora_A"].shape[2]) for b in (ours, added)]
    dtypes = [b["randlora_B"].dtype for b in (ours, added)]
    if dtypes[0] != dtypes[1]:
        raise ValueError(f"its bases are {dtypes[1]}, and those that are there {dtypes[0]}")
    max_dim, min_dim = (max(pair) for pair in zip(*sizes, strict=True))
    if config.very_sparse and sizes[0][1] != sizes[1][1]:
        raise ValueError(
            f"with very_sparse=True the density of bases follows the smaller sides of all layers, "
            f"here {sizes[1][1]} and there {sizes[0][1]}: adapt the same layers, or set sparse=True"
        )
    if (max_dim, min_dim) in sizes:
        larger = (ours, added)[sizes.index((max_dim, min_dim))]
    else:
        ternary = dtypes[0] == jnp.int8
        make = lambda: draw(config, max_dim, min_dim, jnp.float32 if ternary else dtypes[0])
        larger = make() if all(map(has_values, ours.values())) else jax.eval_shape(make)
    if larger is not ours:
        larger = {key: placed_like(ours.get(key), array) for key, array in larger.items()}
    for pair in (ours, added):
        for key, array in pair.items():
            large: Any = larger.get(key, array)
            fits = key in larger and len(large.shape) == len(array.shape)
            fits = fits and all(n <= m for n, m in zip(array.shape, large.shape, strict=True))
            if fits and has_values(large) and has_values(array):
                part = whole(large)[tuple(slice(n) for n in array.shape)]
                fits = bool((np.asarray(part) == np.asarray(array)).all())
            if not fits:
                raise ValueError(f"its {key} is not that which is there: it was drawn otherwise")
    return larger


def sign_probability(config: RandLoraConfig, min_dim: int) -> float | None:
    """Probability of each sign in ternary bases, None for dense ones."""
    if config.sparse:
        return 1 / 6
    # Two signs of probability 1/2 are all there is: below D = 4 nothing is left to be zero.
    return min(1 / math.sqrt(min_dim), 0.5) if config.very_sparse else None


def nbytes(arrays: Mapping[Any, Any]) -> int:
    """Bytes that arrays take, in memory and in a checkpoint; two numbers of 4 bits take one."""
    bits = (math.prod(x.shape) * jax.dtypes.itemsize_bits(x.dtype) for x in arrays.values())
    return sum(-(-count // 8) for count in bits)
