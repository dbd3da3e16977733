"""Folding an update into the base's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from randlora_jax import adapters, kernels, trees
from randlora_jax.bases import Bases
from randlora_jax.config import RandLoraConfig
from randlora_jax.dot_general import check_shapes, delta_weight, prepare_scales


def merge(
    variables: trees.Tree,
    config: RandLoraConfig,
    *,
    safe: bool = True,
    known: Mapping[trees.Path, kernels.Kernel] | None = None,
) -> dict[str, Any]:
    """The base's parameters with each adapted kernel replaced by `W + dW`.

    Args:
      variables: with `"params"`, `"randlora"` and `"randlora_bases"`.
      config: its `r`, `scaling` and `layers_to_transform` count.
      safe: refuse results that are not finite (no effect under `jit`, which has no values).
      known: the kernels as their layers see them, where the shapes don't tell.

    Returns:
      A new tree like `variables["params"]`, dtypes kept; leaves that did not change are shared.

    Raises:
      ValueError: naming the layer, for a result that is not finite or scales that don't fit.
    """
    params = dict(trees.items(variables["params"]))
    for _, where, layout, rows, scales in adapted(variables, config, known):
        name = ".".join(where[:-1])
        boxed = params[where]
        merged = _merge(
            nn.unbox(boxed), variables["randlora_bases"], scales, layout, rows, config.scaling
        )
        if safe and not isinstance(merged, jax.core.Tracer) and not jnp.isfinite(merged).all():
            raise ValueError(
                f"merging {name!r} gives numbers that are not finite: its scales, or the bases, "
                "are broken"
            )
        params[where] = nn.meta.replace_boxed(boxed, merged)
    return trees.build(params)


def adapted(variables: trees.Tree, config: RandLoraConfig, known=None, ambiguous: bool = False):
    """Each adapted kernel: (path of its scales, its own, its `Layout`, rows of its stack, scales).

    Args:
      known: the kernels as their layers see them, where the shapes don't tell.
      ambiguous: take the likeliest layout where the shapes leave a choice.

    Raises:
      ValueError: naming the layer, where scales, bases and kernel don't fit.
    """
    params = dict(trees.items(variables["params"]))
    for path, leaves in kernels.pairs(variables["randlora"]):
        where, axes = kernels.parse_label(path)
        scales = tuple(nn.unbox(leaf) for leaf in leaves)
        if where not in params:
            raise ValueError(
                f"{'.'.join(path)!r} has scales in 'randlora' but no kernel in 'params': the "
                "adapter is of another model"
            )
        shape = nn.unbox(params[where]).shape
        rows = adapters.rows(config, path)
        if rows and rows[-1] < shape[0]:
            shape = (len(rows), *shape[1:])
        try:
            shapes = [s.shape for s in scales]
            found = kernels.layouts(shape, *shapes, axes, where[-1])
            if known is not None and path in known:
                found = [f for f in found if f.kernel.sides == known[path].sides]
            layout = found[0] if ambiguous else kernels.only(found, shape)
            expected = layout.kernel.scale_shapes(config.r)
            check_shapes(variables["randlora_bases"], expected, *layout.kernel.sides)
        except ValueError as error:
            raise ValueError(f"{'.'.join(path)!r}: {error}") from None
        yield path, where, layout, rows, scales


def _merge(kernel, bases: Bases, scales, layout: kernels.Layout, rows, scaling: float):
    def one(kernel, lam, gamma):
        lam, gamma = prepare_scales(bases, (lam, gamma), scaling)
        A, B = bases["randlora_A"], bases["randlora_B"]
        delta = delta_weight(A, B, lam, gamma, *layout.kernel.sides, 1.0)
        return layout.kernel.add(kernel, delta)

    def whole(kernel, lam, gamma):
        some = kernel[jnp.array(rows)] if rows else kernel
        merged = layout.over_stack(one)(some, lam, gamma)
        return kernel.at[jnp.array(rows)].set(merged) if rows else merged

    # An array keeps the sharding it has; a tracer gets its own from the compiler.
    sharding = None if isinstance(kernel, jax.core.Tracer) else getattr(kernel, "sharding", None)
    return jax.jit(whole, out_shardings=sharding)(kernel, *scales)
