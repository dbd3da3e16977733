"""Folding an update into the base's kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from randlora_jax import trees
from randlora_jax.adapters import named
from randlora_jax.bases import Bases
from randlora_jax.checks import check_config, check_variables
from randlora_jax.config import RandLoraConfig
from randlora_jax.ops.dot_general import Scales, delta_weight, prepare_scales
from randlora_jax.sites import Site
from randlora_jax.stored import sites_of


def merge(variables: trees.Tree, config: named.Configs, *, safe: bool = True) -> dict[str, Any]:
    """The base's parameters with each adapted kernel replaced by `W + dW`.

    Args:
      variables: with `"params"`, `"randlora"` and `"randlora_bases"`.
      config: the adapter's, or those of several by name, which are all merged.
      safe: refuse results that are not finite (no effect under `jit`, which has no values).

    Returns:
      A new tree like `variables["params"]`, dtypes kept; leaves that did not change are shared.

    Raises:
      ValueError: naming the layer, for a result that is not finite, for scales that don't fit, and
        for shapes that leave a choice: there `RandLora.merge` takes example inputs.
    """
    check_config(config, several=True)
    return merge_adapters(variables, config, named.by_name(config), safe=safe)


def merge_adapters(
    variables: trees.Tree,
    config: named.Configs,
    active: Mapping[str, RandLoraConfig],
    known: Mapping[trees.Path, Site] | None = None,
    *,
    safe: bool,
) -> dict[str, Any]:
    """`merge`, of the active ones of several adapters, where the sites may be known."""
    check_variables(variables, "params", "randlora", "randlora_bases")
    params = variables["params"]
    for name, one_config in active.items():
        one, _ = named.select({**variables, "params": params}, config, name)
        params = _merge_one(one, one_config, sites_of(one, one_config, known), safe)
    return params


def _merge_one(
    variables: trees.Tree, config: RandLoraConfig, sites: Iterable[Site], safe: bool
) -> dict[str, Any]:
    params = dict(trees.items(variables["params"]))
    for site in sites:
        boxed = params[site.kernel_path]
        lam, gamma = site.scales(variables["randlora"])
        scales = nn.unbox(lam), nn.unbox(gamma)
        merged = _merged(nn.unbox(boxed), variables["randlora_bases"], scales, site, config.scaling)
        if safe and not isinstance(merged, Tracer) and not jnp.isfinite(merged).all():
            raise ValueError(
                f"merging {trees.dotted(site.module)!r} gives numbers that are not finite: its "
                "scales, or the bases, are broken"
            )
        params[site.kernel_path] = nn.meta.replace_boxed(boxed, merged)
    return trees.build(params)


def _merged(
    kernel: jax.Array, bases: Bases, scales: Scales, site: Site, scaling: float
) -> jax.Array:
    def one_layer(kernel, lam, gamma):
        A, B = bases["randlora_A"], bases["randlora_B"]
        lam, gamma = prepare_scales(bases, (lam, gamma), scaling)
        return site.kernel.plus(kernel, delta_weight(A, B, lam, gamma, *site.kernel.features, 1.0))

    def all_layers(kernel, lam, gamma):
        merged = site.stack.over(one_layer)(site.stack.adapted_part(kernel), lam, gamma)
        return site.stack.put(kernel, merged)

    # An array keeps the sharding it has; a tracer gets its own from the compiler.
    sharding = None if isinstance(kernel, Tracer) else getattr(kernel, "sharding", None)
    return jax.jit(all_layers, out_shardings=sharding)(kernel, *scales)
