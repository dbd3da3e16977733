"""What `inject` gives to the modules that it adapts: scales, and what dropout needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from randlora_jax import trees
from randlora_jax.nnx.layers import RandLoraBasis, RandLoraParam, holder
from randlora_jax.nnx.state import spread
from randlora_jax.sites import SCALES, Kernel, Site, Stack, scale_name


def attach(module: Any, site: Site, adapter: str, scales: Mapping[trees.Path, Any]) -> None:
    """Gives a module its scales, stacked as its kernel is."""
    for label in site.kernel.label:
        if not hasattr(module, label):
            setattr(module, label, nnx.Dict())
    names = axis_names(getattr(module, site.kernel.name))
    axes = site.scale_axes(names) if names is not None else {}
    beside = holder(module, site.kernel)
    for scale in SCALES:
        value = spread(site.stack, scales[(*site.path, scale)])
        metadata: dict[str, Any] = {"out_sharding": axes[scale]} if axes else {}
        setattr(beside, scale_name(scale, adapter), RandLoraParam(value, **metadata))
    if site.stack.layers is not None:
        ones = jnp.ones((len(site.stack.layers), 1, 1))
        rows = RandLoraBasis(site.stack.spread(ones))
        setattr(module, scale_name("randlora_rows", adapter), rows)


def attach_dropout(module: Any, stack: Stack, stream: Any) -> None:
    if hasattr(module, "randlora_rngs"):
        return
    if not hasattr(module, "deterministic"):
        module.deterministic, module.randlora_switch = False, True
    sizes = stack.join((), stack.sizes)
    module.randlora_rngs = stream and (stream.split(sizes) if sizes else stream.fork())


def axis_names(variable: nnx.Variable[Any]) -> tuple[Any, ...] | None:
    """The names of a variable's axes, as far as it has any."""
    return variable.get_metadata().get("out_sharding")


def kernels_by_module(sites: Mapping[str, Sequence[Site]]) -> dict[trees.Path, tuple[Kernel, ...]]:
    """The kernels of each module, whichever adapters have scales for them."""
    found: dict[trees.Path, dict[Kernel, None]] = {}
    for site in (site for own in sites.values() for site in own):
        found.setdefault(site.module, {})[site.kernel] = None
    return {path: tuple(kernels) for path, kernels in found.items()}
