"""Folding an update into the base's kernels."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from randlora_jax import trees
from randlora_jax.adapters import named
from randlora_jax.checks import check_config, check_variables
from randlora_jax.config import RandLoraConfig
from randlora_jax.ops.dot_general import delta_weight, prepare_scales
from randlora_jax.ops.products import accumulation_dtype
from randlora_jax.ops.quantised import rounded_floats
from randlora_jax.quantised import codes, floats, is_quantised
from randlora_jax.quantising import Loss, requantised, tell_of_losses
from randlora_jax.sites import Kernel, Site, Stack
from randlora_jax.stored import sites_of


def merge(
    variables: trees.Tree, config: named.Configs, *, safe: bool = True, requantize: bool = False
) -> dict[str, Any]:
    """The base's parameters with each adapted kernel replaced by `W + dW`.

    Args:
      variables: with `"params"`, `"randlora"` and `"randlora_bases"`.
      config: the adapter's, or those of several by name, which are all merged.
      safe: refuse results that are not finite (no effect under `jit`, which has no values).
      requantize: quantise kernels again that were quantised, to the same type and tiles. That
        rounds away what is smaller than their grid: a warning says how much of the update is lost.
        By default all quantised parameters become floats, of their scales' dtype.

    Returns:
      A new tree like `variables["params"]`, dtypes kept; leaves that did not change are shared.

    Raises:
      ValueError: naming the layer, for a result that is not finite, for scales that don't fit, and
        for shapes that leave a choice: there `RandLora.merge` takes example inputs.
    """
    check_config(config, several=True)
    active = named.by_name(config)
    return merge_adapters(variables, config, active, safe=safe, requantize=requantize)


def merge_adapters(
    variables: trees.Tree,
    config: named.Configs,
    active: Mapping[str, RandLoraConfig],
    known: Mapping[trees.Path, Site] | None = None,
    *,
    safe: bool,
    requantize: bool,
) -> dict[str, Any]:
    """`merge`, of the active ones of several adapters, where the sites may be known."""
    check_variables(variables, "params", "randlora", "randlora_bases")
    params = dict(trees.items(variables["params"]))
    added: dict[trees.Path, list[Any]] = {}  # a kernel's updates, and their scales
    for name, one_config in active.items():
        one, _ = named.select(variables, config, name)
        for site in sites_of(one, one_config, known):
            update = site.kernel, site.stack, one_config.scaling
            scales = trees.unboxed(site.scales(one["randlora"]))
            added.setdefault(site.kernel_path, []).append((update, scales))
    losses: dict[str, Loss] = {}
    for path, pairs in added.items():
        kernel, (updates, scales) = trees.unboxed(params[path]), zip(*pairs, strict=True)
        # An array keeps the sharding it has; a tracer gets its own from the compiler.
        array = codes(kernel)
        sharding = None if isinstance(array, Tracer) else getattr(array, "sharding", None)
        merged = _merger(updates, sharding)(kernel, dict(variables["randlora_bases"]), scales)
        if safe and not isinstance(merged, Tracer) and not jnp.isfinite(merged).all():
            raise ValueError(
                f"merging {trees.shown(path[:-1])} gives numbers that are not finite: its "
                "scales, or the bases, are broken"
            )
        if requantize and is_quantised(kernel):
            merged, losses[trees.dotted(path)] = requantised(kernel, merged)
        params[path] = trees.replaced(params[path], merged)
    tell_of_losses(losses, stacklevel=4)
    if not requantize:
        params = {path: _as_floats(leaf) for path, leaf in params.items()}
    return trees.build(params)


def _as_floats(leaf: Any) -> Any:
    """A kernel without an update, for a model that knows nothing of codes."""
    return trees.replaced(leaf, floats(trees.unboxed(leaf))) if is_quantised(leaf) else leaf


@functools.lru_cache(maxsize=256)  # layers of one shape share what is compiled
def _merger(updates: tuple[tuple[Kernel, Stack, float], ...], sharding: Any) -> Any:
    """A function of a stored kernel, the bases and a pair of scales for each update."""

    def merged(stored, bases, scales):
        A, B = bases["randlora_A"], bases["randlora_B"]
        stored = rounded_floats(stored)
        total = stored.astype(accumulation_dtype(stored.dtype, *(lam.dtype for lam, _ in scales)))
        for (kernel, stack, scaling), pair in zip(updates, scales, strict=True):

            def one_layer(value, lam, gamma, kernel: Kernel = kernel, scaling=scaling):
                lam, gamma = prepare_scales(bases, (lam, gamma), scaling)
                return kernel.plus(value, delta_weight(A, B, lam, gamma, *kernel.features, 1.0))

            changed = stack.over(one_layer)(stack.adapted_part(total), *pair)
            total = stack.put(total, changed)
        return total.astype(stored.dtype)

    return jax.jit(merged, out_shardings=sharding)
