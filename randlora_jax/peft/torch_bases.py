"""The bases that PEFT draws from a seed with torch >= 2.12, bit for bit, drawn by NumPy alone.

An adapter that PEFT saved with `save_projection=False` holds its seed in place of its bases.
Source: PEFT's `tuners/randlora/model.py`, and torch's `ATen/native/cpu/DistributionTemplates.h`,
as released in 2.12 to 2.14; torch <= 2.11 draws bfloat16 otherwise, and so has other dense bases.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from randlora_jax.bases import num_bases
from randlora_jax.config import RandLoraConfig

_BLOCK = 1 << 20  # numbers at a time: what is drawn passes through 64 bits


def draw(config: RandLoraConfig, max_dim: int, min_dim: int) -> dict[str, np.ndarray]:
    """Draws the bases as PEFT does; where both are set, `very_sparse` wins over `sparse`.

    Args:
      config: `r`, `projection_prng_key`, `sparse` and `very_sparse` count.
      max_dim, min_dim: as `randlora_jax.bases.shared_dims` gives them.

    Returns:
      `randlora_A` (r, 1, min_dim) and `randlora_B` (max_dim, num_bases, r), float32. Dense values
      are bfloat16 numbers; ternary ones are 0 and, of either sign, 1 / the sample's deviation.

    Example:
      >>> A = draw(RandLoraConfig(r=4), max_dim=10, min_dim=6)["randlora_A"]
      >>> A.shape, A[0, 0, :2].tolist()
      ((4, 1, 6), [-0.01397705078125, 1.0])
    """
    bits = np.random.MT19937()
    # torch seeds its generator as NumPy's older interface does, and by the low 32 bits alone.
    legacy = np.random.RandomState(config.projection_prng_key & 0xFFFFFFFF)
    state: Any = legacy.get_state(legacy=False)
    bits.state = state
    r, n = config.r, num_bases(min_dim, config.r)
    if config.sparse or config.very_sparse:
        sparsity = math.sqrt(min_dim) if config.very_sparse else 3
        A = _ternary(bits, (r, 1, min_dim), sparsity)
        B = _ternary(bits, (max_dim, n, r), sparsity)
    else:
        A = _uniform(bits, r * min_dim, fan_in=min_dim).reshape(r, 1, min_dim)
        B = np.empty((max_dim, n, r), ml_dtypes.bfloat16)
        for b in range(n):  # basis by basis, which is not B's order in memory
            B[:, b] = _uniform(bits, max_dim * r, fan_in=r).reshape(max_dim, r)
        A, B = _unit_variance(A), _unit_variance(B)
    return {"randlora_A": A, "randlora_B": B}


def _raw(bits, size):
    """torch's uniform numbers of 24 bits, as float32 in [0, 1)."""
    u = np.empty(size, np.float32)
    for start in range(0, size, _BLOCK):
        part = u[start : start + _BLOCK]
        part[:] = bits.random_raw(part.size) & 0xFFFFFF
    return u * np.float32(2**-24)


def _uniform(bits, size, fan_in):
    """`kaiming_uniform_(a=sqrt(5))` of a bfloat16 tensor."""
    bound = math.sqrt(3) * (math.sqrt(2 / (1 + 5)) / math.sqrt(fan_in))
    low, high = np.float32(-bound), np.float32(bound)
    u = _raw(bits, size)
    # One fused multiply-add in float32; in float64 the product is exact and the sum nearly so.
    wide = u.astype(np.float64) * np.float64(high - low) + np.float64(low)
    x = wide.astype(np.float32).astype(ml_dtypes.bfloat16)
    # The interval is open above: what rounding takes to its end goes to the other one.
    x[x == high.astype(ml_dtypes.bfloat16)] = low.astype(ml_dtypes.bfloat16)
    return x


def _unit_variance(x):
    """x / x.std(), both rounded to bfloat16, as float32."""
    flat = x.reshape(-1)
    total = squares = 0.0
    for start in range(0, flat.size, _BLOCK):
        total += flat[start : start + _BLOCK].astype(np.float64).sum()
    for start in range(0, flat.size, _BLOCK):
        part = flat[start : start + _BLOCK].astype(np.float64) - total / flat.size
        squares += part @ part
    deviation = np.float32(np.asarray(_deviation(squares, flat.size)).astype(ml_dtypes.bfloat16))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (x.astype(np.float32) / deviation).astype(ml_dtypes.bfloat16).astype(np.float32)


def _ternary(bits, shape, sparsity):
    size, edge = math.prod(shape), 1 / (2 * sparsity)
    u = _raw(bits, size)
    signs = (u > np.float32(1 - edge)).astype(np.int8) - (u < np.float32(edge)).astype(np.int8)
    total, nonzero = int(signs.sum(dtype=np.int64)), np.count_nonzero(signs)
    deviation = np.float32(_deviation(nonzero - total**2 / size, size))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (signs.astype(np.float32) / deviation).reshape(shape)


def _deviation(squares, size):
    """The sample's deviation; like torch's, not a number for a sample of one."""
    return math.sqrt(squares / (size - 1)) if size > 1 else math.nan
