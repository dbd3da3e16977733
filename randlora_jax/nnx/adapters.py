"""Several adapters by name on an injected NNX model: added, deleted, switched, made stronger."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from randlora_jax import bases, trees
from randlora_jax.adapters import named
from randlora_jax.checks import check_config, check_variables
from randlora_jax.config import RandLoraConfig
from randlora_jax.initial import initial_scales
from randlora_jax.nnx.attaching import (
    Adapters,
    attach,
    detach_dropout,
    given_scales,
    making_variables,
)
from randlora_jax.nnx.classes import all_or_nothing
from randlora_jax.nnx.discovery import find, modules_of, tell_left_out
from randlora_jax.nnx.layers import has_scales, holder
from randlora_jax.nnx.lending import (
    STRENGTH,
    RandLoraBasis,
    adapted_modules,
    bases_of,
    lend_again,
)
from randlora_jax.nnx.state import (
    active_of,
    base_variables,
    config_of,
    set_config,
    variables,
)
from randlora_jax.placement import placed_like
from randlora_jax.raw_parameters import Parameters
from randlora_jax.sharding import whole_beside
from randlora_jax.sites import SCALES, Site, scale_name


def set_active(model: nnx.Module, names: tuple[str, ...] | None) -> None:
    """Switches adapters: the updates of the `names` are summed from now on; () is the base alone.

    Args:
      model: an injected model.
      names: of adapters; None is all.

    Raises:
      ValueError: for a name that is none of the adapters'.

    Example:
      >>> from randlora_jax.nnx import inject
      >>> configs = {n: RandLoraConfig(r=2, target_modules="all-linear") for n in ("a", "b")}
      >>> model = inject(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), configs)
      >>> set_active(model, ("b",))
    """
    config = config_of(model)
    named.check(config, names)
    _set_active(model, named.active(config, names))


def insert(
    model: nnx.Module,
    name: str,
    config: RandLoraConfig,
    *,
    values: trees.Tree | None = None,
    parameters: Parameters | None = None,
    rngs: nnx.Rngs | None = None,
    data_axes: Sequence[str] | None = None,
) -> None:
    """Adds an adapter to a model that was injected with others by name; it is not active yet.

    Nothing that is there changes, but the bases where the new adapter needs larger ones, of which
    the old are a part. `set_active` makes it active, and `trainable(model, (name,))` trains it. Its
    dropout is on until `model.eval()`.

    Args:
      model: an injected model.
      name: of the adapter.
      config: the adapter's.
      values: its scales and bases to begin with, as `randlora_jax.load_adapter` gives them.
      parameters, rngs, data_axes: as for `inject`.

    Raises:
      ValueError: if the name is taken, if the adapters can't share their bases, and as `inject`;
        nothing is changed then.

    Example:
      >>> from randlora_jax.nnx import inject
      >>> config = RandLoraConfig(r=2, target_modules="all-linear")
      >>> model = inject(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), {"chat": config})
      >>> insert(model, "code", config.replace(randlora_alpha=8))
      >>> set_active(model, ("code",))
    """
    configs, modules = config_of(model), modules_of(model)
    check_config(config)
    if isinstance(configs, RandLoraConfig):
        raise TypeError(
            "the model has one adapter without a name: to add others, inject(model, {'name': "
            "config}) at first"
        )
    named.check({**configs, name: config})
    sites = find(modules, config, parameters or {})
    if values is None:
        scales = _abstract_if(model, lambda: initial_scales(config, sites))
        added = {
            "randlora": trees.build(scales),
            "randlora_bases": _bases_for(model, sites, config),
        }
    else:
        check_variables(values, "randlora", "randlora_bases")
        added = dict(values)
    # It raises where they can't be on the same bases.
    joined, configs = named.insert(variables(model), configs, name, added, config)
    larger = {
        key: placed_like(getattr(model, key).get_value(), value)
        for key, value in joined["randlora_bases"].items()
    }
    base = {**base_variables(model), "randlora_bases": larger}
    found = given_scales(added["randlora"], config, sites, base)
    tell_left_out(modules, {name: sites}, {name: config})
    strategy = next(iter(adapted_modules(model).values())).randlora_layer.strategy
    active = tuple(active_of(model).items())
    params = base["params"]
    with making_variables(params), all_or_nothing(modules.values()):
        new = Adapters({name: config}, {name: sites}, {name: whole_beside(params, found)})
        attach(model, modules, new, active, strategy, rngs, data_axes)
        set_config(model, configs)
    for key, value in larger.items():
        own = getattr(model, key)
        if value.shape != own.get_value().shape:
            own.set_value(value)
    lend_again(model)


def delete(model: nnx.Module, name: str) -> None:
    """Takes one of several adapters away; the others stay as they are, and the bases.

    Args:
      model: an injected model.
      name: of the adapter.

    Raises:
      ValueError: if there is no such adapter, or no other one.

    Example:
      >>> from randlora_jax.nnx import inject
      >>> configs = {n: RandLoraConfig(r=2, target_modules="all-linear") for n in ("a", "b")}
      >>> model = inject(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), configs)
      >>> delete(model, "a")
      >>> sorted(dict(model.randlora_config))
      ['b']
    """
    configs = named.without(config_of(model), name)
    active = {key: config for key, config in active_of(model).items() if key != name}
    with all_or_nothing(modules_of(model).values()):
        for module in adapted_modules(model).values():
            kernels = module.randlora_layer.kernels
            for kernel in kernels:
                if has_scales(module, kernel, name):
                    for scale in SCALES:
                        delattr(holder(module, kernel), scale_name(scale, name))
            _forget(module, scale_name("randlora_rows", name))
            left = [n for n in configs if any(has_scales(module, k, n) for k in kernels)]
            if not any(configs[n].randlora_dropout for n in left):
                detach_dropout(module)
        _forget(model, scale_name(STRENGTH, name))
        _set_active(model, active)
        set_config(model, configs)


def set_strength(
    model: nnx.Module, strength: float | jax.Array | Mapping[str, float | jax.Array]
) -> None:
    """Multiplies updates by numbers from now on, in `merge` too; 1 is as they were trained.

    Only the first call for an adapter makes a jitted function of the model trace anew; a jitted
    method of a model with stacks is traced for each number. What `variables` gives, and so what is
    saved, is the adapter without its strength.

    Args:
      model: an injected model.
      strength: a number; of several adapters, numbers by name for those that change.

    Raises:
      ValueError: for a name that is none of the adapters', and for what is no number.

    Example:
      >>> from randlora_jax.nnx import inject
      >>> configs = {n: RandLoraConfig(r=2, target_modules="all-linear") for n in ("a", "b")}
      >>> model = inject(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), configs)
      >>> set_strength(model, {"a": 0.5, "b": 2.0})
    """
    numbers = named.strengths(config_of(model), strength)
    for name, number in numbers.items():
        key = scale_name(STRENGTH, name)
        if key in vars(model):
            getattr(model, key).set_value(number)
        else:
            setattr(model, key, RandLoraBasis(number))
    lend_again(model)


def _bases_for(model: nnx.Module, sites: Sequence[Site], config: RandLoraConfig) -> bases.Bases:
    """A model's bases, if they are large enough for more sites, or larger ones."""
    own = bases_of(model)
    A, B = own["randlora_A"], own["randlora_B"]
    needed = bases.read_dims(config, [site.kernel.features for site in sites])
    size = max(B.shape[0], needed[0]), max(A.shape[2], needed[1])
    if size == (B.shape[0], A.shape[2]):
        return own
    dtype = jnp.float32 if B.dtype == jnp.int8 else B.dtype
    return _abstract_if(model, lambda: bases.draw(config, *size, dtype))


def _abstract_if(model: nnx.Module, make: Callable[[], Any]) -> Any:
    """What is made, or for an abstract model its shapes."""
    abstract = isinstance(bases_of(model)["randlora_A"], jax.ShapeDtypeStruct)
    return jax.eval_shape(make) if abstract else make()


def _forget(module: nnx.Module, name: str) -> None:
    if hasattr(module, name):
        delattr(module, name)


def _set_active(model: nnx.Module, active: Mapping[str, RandLoraConfig]) -> None:
    pairs = tuple(active.items())
    for module in adapted_modules(model).values():
        module.randlora_layer = dataclasses.replace(module.randlora_layer, adapters=pairs)
