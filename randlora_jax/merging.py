"""Folding an update into the base's kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from randlora_jax import trees
from randlora_jax.bases import Bases, num_bases
from randlora_jax.config import RandLoraConfig
from randlora_jax.dot_general import check_shapes, delta_weight, prepare_scales


def merge(
    variables: trees.Tree,
    config: RandLoraConfig,
    *,
    safe: bool = True,
    num_inputs: Mapping[trees.Path, int] | None = None,
) -> dict[str, Any]:
    """The base's parameters with each adapted kernel replaced by `W + dW`.

    Args:
      variables: with `"params"`, `"randlora"` and `"randlora_bases"`.
      config: its `r` and `scaling` count.
      safe: refuse results that are not finite (no effect under `jit`, which has no values).
      num_inputs: how many of a kernel's axes are inputs, where the shapes don't tell.

    Returns:
      A new tree like `variables["params"]`, dtypes kept; leaves that did not change are shared.

    Raises:
      ValueError: naming the layer, for a result that is not finite or scales that don't fit.
    """
    params = dict(trees.items(variables["params"]))
    for path, (lam, gamma) in scales_by_layer(variables["randlora"]).items():
        name = ".".join(path)
        where = (*path, "kernel")
        if where not in params:
            raise ValueError(
                f"{name!r} has scales in 'randlora' but no kernel in 'params': the "
                "adapter is of another model"
            )
        boxed = params[where]
        kernel = nn.unbox(boxed)
        try:
            inputs = (num_inputs or {}).get(path) or infer_num_inputs(
                kernel.shape, lam.shape, gamma.shape
            )
            merged = _merge_kernel(
                kernel, variables["randlora_bases"], (lam, gamma), inputs, config.scaling
            )
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        if safe and not isinstance(merged, jax.core.Tracer) and not jnp.isfinite(merged).all():
            raise ValueError(
                f"merging {name!r} gives numbers that are not finite: its scales, or "
                "the bases, are broken"
            )
        params[where] = boxed.replace_boxed(merged) if boxed is not kernel else merged
    return trees.build(params)


def scales_by_layer(scales: trees.Tree) -> dict[trees.Path, tuple[Any, Any]]:
    """{layer's path: (lambda, gamma)}, unboxed, of a `"randlora"` collection."""
    leaves = {path: nn.unbox(leaf) for path, leaf in trees.items(scales)}
    layers = sorted({path[:-1] for path in leaves})
    try:
        pairs = {
            p: tuple(leaves[(*p, f"randlora_{s}")] for s in ("lambda", "gamma")) for p in layers
        }
    except KeyError as error:
        raise ValueError(f"'randlora' lacks {'.'.join(error.args[0])!r}") from None
    return pairs


def possible_sides(
    kernel: tuple[int, ...], lam: tuple[int, ...], gamma: tuple[int, ...]
) -> dict[tuple[int, int], int]:
    """The (in, out) that scales of these shapes allow a kernel, each with its number of input axes.

    Raises:
      ValueError: if there is none.
    """
    stack = len(lam) - 2
    core = kernel[stack:]
    fits = {}
    for i in range(1, len(core)):
        sides = math.prod(core[:i]), math.prod(core[i:])
        small = min(sides)
        if gamma[-1] == small and lam[-1] == gamma[-2] == num_bases(small, lam[-2]):
            fits.setdefault(sides, i)
    if not fits or not kernel[:stack] == lam[:stack] == gamma[:stack]:
        raise ValueError(
            f"scales of shapes {lam} and {gamma} don't fit a kernel of {kernel}: "
            "they are of another model or another r"
        )
    return fits


def infer_num_inputs(kernel: tuple[int, ...], lam: tuple[int, ...], gamma: tuple[int, ...]) -> int:
    """How many axes of a kernel, after those of the stack, are inputs: told by the scales' shapes.

    Raises:
      ValueError: if no division fits, or if two different ones do.
    """
    fits = possible_sides(kernel, lam, gamma)
    if len(fits) > 1:
        raise ValueError(
            f"a kernel of {kernel} can be any of {sorted(fits)} (in, out): give the model's "
            "example inputs too, as in merge(variables, x)"
        )
    return next(iter(fits.values()))


def _merge_kernel(kernel, bases: Bases, scales, num_inputs: int, scaling: float):
    stack = scales[0].ndim - 2
    core = kernel.shape[stack:]
    sides = math.prod(core[:num_inputs]), math.prod(core[num_inputs:])
    check_shapes(bases, tuple(jax.eval_shape(lambda s: s[(0,) * stack], s) for s in scales), *sides)
    one = functools.partial(_merge_one, scaling=scaling, sides=sides)
    for _ in range(stack):
        one = jax.vmap(one, (0, None, 0))
    # An array keeps the sharding it has; a tracer gets its own from the compiler.
    sharding = None if isinstance(kernel, jax.core.Tracer) else getattr(kernel, "sharding", None)
    return jax.jit(one, out_shardings=sharding)(kernel, bases, scales)


def _merge_one(kernel, bases, scales, *, scaling, sides):
    lam, gamma = prepare_scales(bases, scales, scaling)
    delta = delta_weight(bases["randlora_A"], bases["randlora_B"], lam, gamma, *sides, 1.0)
    wide = jnp.promote_types(kernel.dtype, delta.dtype)
    return (kernel.astype(wide) + delta.reshape(kernel.shape).astype(wide)).astype(kernel.dtype)
