"""Several adapters by name, which share their bases; one config alone is one without a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from randlora_jax import trees
from randlora_jax.bases import SCALING, joined
from randlora_jax.checks import check_config, check_variables
from randlora_jax.config import RandLoraConfig
from randlora_jax.sites import LAMBDA

Configs = RandLoraConfig | Mapping[str, RandLoraConfig]
Strength = float | jax.Array

_SHARED = (
    ("projection_prng_key", "it draws the bases, which all adapters share"),
    ("fan_in_fan_out", "a kernel is read in one way"),
    ("r", "the bases have r rows, and num_bases follows from it"),
    ("sparse", "the bases are either ternary or dense"),
    ("very_sparse", "the bases are either ternary or dense"),
    ("save_projection", "the bases are saved for all adapters or for none"),
)


def by_name(config: Configs) -> dict[str, RandLoraConfig]:
    """The adapters' configs by name; a config alone has the name ""."""
    return dict(config) if isinstance(config, Mapping) else {"": config}


def active(config: Configs, names: tuple[str, ...] | None) -> dict[str, RandLoraConfig]:
    """The adapters whose updates are summed: those of the names, or all."""
    configs = by_name(config)
    return configs if names is None else {name: configs[name] for name in names}


def check(config: Configs, names: tuple[str, ...] | None = None) -> None:
    """Raises an error for adapters that can't share their bases, and for names that can't be."""
    configs = by_name(config)
    for name in config if isinstance(config, Mapping) else ():
        if not isinstance(name, str):
            raise TypeError(
                f"config must name its adapters by strings, as in {{'chat': config}}, got {name!r}"
            )
        if not name:  # it stands for one config alone, whose scales are in no tree of its own
            raise ValueError(
                "config names an adapter '': give it a name, as in {'default': config}, or give "
                "the config alone if it is the only one"
            )
    if not configs:
        raise ValueError("config is an empty mapping: give at least one adapter")
    if isinstance(names, str):
        raise TypeError(f"adapters are named in a tuple, as in ({names!r},), got {names!r}")
    unknown = [name for name in names or () if name not in configs]
    if unknown:
        raise ValueError(f"{names!r} names {unknown}, {_there_is(config)}")
    for field, why in _SHARED:
        values = {name: getattr(one, field) for name, one in configs.items()}
        if len(set(values.values())) > 1:
            raise ValueError(f"{field} must be the same for all adapters, not {values}: {why}")
    train_more = [n for n, c in configs.items() if c.bias != "none" or c.modules_to_save]
    if len(configs) > 1 and train_more:
        raise ValueError(
            f"{train_more} train biases or modules_to_save, which adapters of one base would "
            "share: set bias='none' and modules_to_save=None, or keep one adapter"
        )


def select(
    variables: trees.Tree, config: Configs, name: str
) -> tuple[dict[str, Any], RandLoraConfig]:
    """`rl.adapters.select`, of several trees, or of the one there is."""
    _check(variables, config)
    if name not in by_name(config):
        raise ValueError(f"there is no adapter {name!r}: {_there_is(config)}")
    if not isinstance(config, Mapping):
        return dict(variables), config
    return {**variables, "randlora": scales_of(variables, name)}, config[name]


def insert(
    variables: trees.Tree,
    config: Mapping[str, RandLoraConfig],
    name: str,
    added: trees.Tree,
    added_config: RandLoraConfig,
) -> tuple[dict[str, Any], dict[str, RandLoraConfig]]:
    """`rl.adapters.insert`, to several trees."""
    for one in (variables, added):
        check_variables(one, "randlora", "randlora_bases")
    _check(variables, config)
    if not isinstance(config, Mapping):
        raise TypeError("config must name its adapters: {'name': config}, as must 'randlora'")
    if name in config:
        raise ValueError(f"there is an adapter {name!r} already: {sorted(config)}")
    configs = {**config, name: added_config}
    check(configs)
    try:
        bases = joined(added_config, variables["randlora_bases"], added["randlora_bases"])
    except ValueError as error:
        raise ValueError(f"{name!r} can't be beside {sorted(config)}: {error}") from None
    scales = {**variables["randlora"], name: added["randlora"]}
    return {**variables, "randlora": scales, "randlora_bases": dict(bases)}, configs


def delete(
    variables: trees.Tree, config: Mapping[str, RandLoraConfig], name: str
) -> tuple[dict[str, Any], dict[str, RandLoraConfig]]:
    """`rl.adapters.delete`, of several trees."""
    _check(variables, config)
    configs = without(config, name)
    scales = {n: scales_of(variables, n) for n in configs}
    return {**variables, "randlora": scales}, configs


def with_strength(
    variables: trees.Tree, config: Configs, strength: Strength | Mapping[str, Strength]
) -> dict[str, Any]:
    """`rl.adapters.with_strength`, of several trees, or of the one there is."""
    _check(variables, config)
    scaled = dict(trees.items(variables["randlora"]))
    for name, number in strengths(config, strength).items():
        prefix = (name,) if name else ()
        for path, leaf in scaled.items():
            if path[: len(prefix)] == prefix and path[-1] == LAMBDA:
                value = trees.unboxed(leaf)
                scaled[path] = nn.meta.replace_boxed(leaf, value * number.astype(value.dtype))
    return {**variables, "randlora": trees.build(scaled)}


def strengths(config: Configs, strength: Strength | Mapping[str, Strength]) -> dict[str, jax.Array]:
    """Numbers by the adapters' names, checked."""
    given = strength if isinstance(strength, Mapping) else dict.fromkeys(by_name(config), strength)
    unknown = sorted(set(given) - set(by_name(config)))
    if unknown:
        raise ValueError(f"strength names {unknown}, {_there_is(config)}")
    # Copies, since a model that is donated would take the user's own with it.
    numbers = {}
    for name, value in given.items():
        if jnp.shape(value) != () or not jnp.isrealobj(value):
            raise ValueError(f"strength must be a number, got {value!r} for {name!r}")
        numbers[name] = jnp.array(value, jnp.float32)
    return numbers


def without(config: Configs, name: str) -> dict[str, RandLoraConfig]:
    """The configs of the other adapters."""
    others = {key: one for key, one in by_name(config).items() if key != name}
    if not isinstance(config, Mapping) or name not in config:
        raise ValueError(f"there is no adapter {name!r}: {_there_is(config)}")
    if not others:
        raise ValueError(
            f"{name!r} is the only adapter: leave 'randlora' and 'randlora_bases' out of the "
            "variables, or in NNX remove(model)"
        )
    return others


def _check(variables: trees.Tree, config: Configs) -> None:
    """Raises an error for variables that don't have the scales of the config's adapters."""
    check_variables(variables, "randlora")
    check_config(config, several=True)
    for name in by_name(config):
        scales_of(variables, name)


def _there_is(config: Configs) -> str:
    if isinstance(config, Mapping):
        return f"the adapters are {sorted(config)}"
    return "the one adapter has no name"


def scales_of(variables: trees.Tree, name: str) -> trees.Tree:
    """One adapter's tree of scales; it is all of "randlora" if there is one without a name.

    Raises:
      ValueError: if there is none of that name.
    """
    scales = variables["randlora"]
    if name and name not in scales and SCALING in variables.get("randlora_bases", {}):
        raise ValueError(f"'randlora' is a table, not one tree for {name!r}: give table.config")
    if name and name not in scales:
        raise ValueError(
            f"config names an adapter {name!r}, and 'randlora' holds {sorted(scales)}: of one "
            "adapter without a name, give the config alone"
        )
    return scales[name] if name else scales


def together(scales: Mapping[str, trees.Tree]) -> dict[str, Any]:
    """What "randlora" holds, from each adapter's scales: the inverse of `scales_of`."""
    return dict(scales[""]) if "" in scales else dict(scales)
