"""What adapters give to the modules of a model: scales, what dropout needs, and another class."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import get_pspec
from jax.sharding import Mesh

from randlora_jax import trees
from randlora_jax.config import RandLoraConfig
from randlora_jax.nnx.classes import take_class
from randlora_jax.nnx.discovery import axis_names
from randlora_jax.nnx.layers import AdaptedLayer, RandLoraParam, holder, quantised_of
from randlora_jax.nnx.lending import RandLoraBasis, settle
from randlora_jax.nnx.state import check_same, spread
from randlora_jax.ops.costs import Strategy
from randlora_jax.sharding import along, followed, mesh_of, spec_of
from randlora_jax.sites import LAMBDA, SCALES, Kernel, Site, Stack, scale_name
from randlora_jax.stored import of_one_slot, sites_of, slots_of

Scales = Mapping[trees.Path, Any]


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters that are new to a model, by name: their configs, where they act, their scales."""

    configs: Mapping[str, RandLoraConfig]
    sites: Mapping[str, Sequence[Site]]
    scales: Mapping[str, Scales]


def attach(
    model: nnx.Module,
    modules: Mapping[trees.Path, Any],
    new: Adapters,
    active: tuple[tuple[str, RandLoraConfig], ...],
    strategy: Strategy,
    rngs: nnx.Rngs | None,
    data_axes: Sequence[str] | None,
) -> None:
    """Gives new adapters to the modules of a model, which may have others already."""
    dropout = any(config.randlora_dropout for config in new.configs.values())
    stream: Any = _stream(rngs) if rngs is not None and dropout else None
    for name, config in new.configs.items():
        for site in new.sites[name]:
            _attach_scales(modules[site.module], site, name, new.scales[name], data_axes)
            if config.randlora_dropout:
                _attach_dropout(modules[site.module], site.stack, stream)
    attach_products(modules)
    for path, kernels in _kernels_by_module(new.sites).items():
        layer = modules[path]
        adapted = "randlora_layer" in vars(layer)
        before = layer.randlora_layer.kernels if adapted else ()
        told = layer.randlora_layer.told if adapted else ()
        # By name and axes: a model may have been cast meanwhile.
        together = {(k.name, k.axes): k for k in (*before, *kernels)}
        layer.randlora_layer = AdaptedLayer(tuple(together.values()), active, strategy, told)
        take_class(layer, adapted=True, root="randlora_config" in vars(layer))
        settle(layer, model)


def attach_products(modules: Mapping[trees.Path, Any]) -> None:
    """Gives layers with quantised parameters our class for their product, whether adapted or not.

    One that the root of a model has besides, and lends by, stays.
    """
    for layer in modules.values():
        if quantised_of(layer) and "randlora_layer" not in vars(layer):
            layer.randlora_layer = AdaptedLayer((), (), "auto")
            take_class(layer, adapted=True, root="randlora_config" in vars(layer))


def _stream(rngs: nnx.Rngs) -> Any:
    try:
        return rngs["dropout"]
    except (KeyError, AttributeError):
        raise ValueError(
            "rngs has no stream for randlora_dropout: give nnx.Rngs(dropout=0), or a default"
        ) from None


def given_scales(
    given: trees.Tree, config: RandLoraConfig, sites: Sequence[Site], variables: trees.Tree
) -> Scales:
    """Scales that were given to begin with, by path.

    Args:
      variables: of the base, with the bases that belong to the scales.

    Raises:
      ValueError: if they don't fit the sites, or the bases.
    """
    slots = slots_of(variables)
    stored = (site.stored_scales(config.r, slots) for site in sites)
    check_same(given, trees.build(dict(collections.ChainMap(*stored))))
    variables = {**variables, "randlora": given}
    sites_of(of_one_slot(variables, config) if slots else variables, config, guess=True)
    return dict(trees.items(given))


def making_variables(params: trees.Tree) -> contextlib.AbstractContextManager[Any]:
    """In which Flax puts new variables where their names say: on the mesh of the parameters.

    Of abstract parameters there is nothing to put.
    """
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for _, leaf in trees.items(params)):
        return nnx.use_eager_sharding(False)
    mesh = mesh_of(params)
    if not isinstance(mesh, Mesh) or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.set_mesh(mesh)


def _attach_scales(
    module: Any, site: Site, adapter: str, scales: Scales, data_axes: Sequence[str] | None
) -> None:
    """Gives a module its scales, stacked as its kernel is."""
    for label in site.kernel.label:
        if not hasattr(module, label):
            setattr(module, label, nnx.Dict())
    kernel = getattr(module, site.kernel.name)
    names, array = axis_names(kernel), kernel.get_value()
    rules = kernel.get_metadata().get("sharding_rules")
    resolve = lambda name: next(iter(get_pspec((name,), rules)))
    divided_by = spec_of(array) if names is None else names
    lam, layer = scales[(*site.path, LAMBDA)], 2 + len(site.kernel.stacked)
    slots = (None,) * (lam.ndim - layer - len(site.stack.axes))
    axes = site.scale_axes(divided_by, followed(data_axes, resolve), slots)
    beside = holder(module, site.kernel)
    for scale in SCALES:
        value = spread(site.stack, scales[(*site.path, scale)])
        metadata: dict[str, Any] = {}
        if names is None:
            value = along(array, axes[scale], value)
        else:  # Flax puts it where its names say
            metadata = {"out_sharding": axes[scale]} | ({"sharding_rules": rules} if rules else {})
        setattr(beside, scale_name(scale, adapter), RandLoraParam(value, **metadata))
    if site.stack.layers is not None:
        ones = jnp.ones((len(site.stack.layers), 1, 1))
        rows = RandLoraBasis(site.stack.spread(ones))
        setattr(module, scale_name("randlora_rows", adapter), rows)


def _attach_dropout(module: Any, stack: Stack, stream: Any) -> None:
    if vars(module).get("randlora_rngs") is not None:
        return
    if not hasattr(module, "deterministic"):
        module.deterministic, module.randlora_switch = False, True
    if "randlora_rngs" in vars(module):
        del module.randlora_rngs  # None, which is no data to NNX, and so would nothing else be
    sizes = stack.join((), stack.sizes)
    module.randlora_rngs = stream and (stream.split(sizes) if sizes else stream.fork())


def detach_dropout(module: Any) -> None:
    """Takes away what dropout needed."""
    names = ["randlora_rngs", "randlora_switch"]
    names += ["deterministic"] if "randlora_switch" in vars(module) else []
    for name in names:
        if name in vars(module):
            delattr(module, name)


def _kernels_by_module(
    sites: Mapping[str, Sequence[Site]],
) -> dict[trees.Path, dict[Kernel, None]]:
    """The kernels of each module, in order, whichever adapters have scales for them."""
    found: dict[trees.Path, dict[Kernel, None]] = {}
    for site in (site for own in sites.values() for site in own):
        found.setdefault(site.module, {})[site.kernel] = None
    return found
