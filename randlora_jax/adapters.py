"""Several adapters on one base and one pair of bases, and where their scales sit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from randlora_jax import targets, trees
from randlora_jax.config import RandLoraConfig
from randlora_jax.kernels import SCALES, Kernel, pairs, parse_label

Configs = RandLoraConfig | Mapping[str, RandLoraConfig]


def named(config: Configs) -> dict[str, RandLoraConfig]:
    """The adapters by name; a config alone has the name ""."""
    return dict(config) if isinstance(config, Mapping) else {"": config}


def active_names(config: Configs, active: tuple[str, ...] | None) -> tuple[str, ...]:
    """The names of the adapters whose updates are summed."""
    return tuple(named(config)) if active is None else tuple(active)


def check_names(config: Configs, active: tuple[str, ...] | None) -> None:
    """Raises a ValueError for adapters that can't share their bases, and for unknown names."""
    configs = named(config)
    if not configs:
        raise ValueError("config is an empty mapping: give at least one adapter")
    if isinstance(active, str):
        raise TypeError(f"active must be a tuple of names, got {active!r}")
    unknown = [name for name in active or () if name not in configs]
    if unknown:
        raise ValueError(f"active={active!r} names {unknown}, the adapters are {sorted(configs)}")
    first_name, first = next(iter(configs.items()))
    for name, other in configs.items():
        check_together(first_name, first, name, other)
    whole = [n for n, c in configs.items() if c.bias != "none" or c.modules_to_save]
    if len(configs) > 1 and whole:
        raise ValueError(
            f"{whole} train biases or modules_to_save, which adapters of one base would share: "
            "set bias='none' and modules_to_save=None, or keep one adapter"
        )


def check_together(name: str, config: RandLoraConfig, other_name: str, other: RandLoraConfig):
    """Raises a ValueError if two adapters can't be on the same bases."""
    for field, why in (
        ("projection_prng_key", "it draws the bases, which all adapters share"),
        ("r", "the bases have r rows, and num_bases follows from it"),
        ("sparse", "the bases are either ternary or dense"),
        ("very_sparse", "the bases are either ternary or dense"),
        ("save_projection", "the bases are saved for all adapters or for none"),
    ):
        mine, theirs = getattr(config, field), getattr(other, field)
        if mine != theirs:
            raise ValueError(
                f"{field} must be the same for all adapters: {name!r} has {mine!r} and "
                f"{other_name!r} has {theirs!r}; {why}"
            )


def select(
    variables: trees.Tree, config: Configs, name: str
) -> tuple[dict[str, Any], RandLoraConfig]:
    """One of several adapters, as if it were the only one: for `split`, `save_adapter`, `summary`.

    Example:
      >>> variables = {"params": {}, "randlora": {"a": {"x": 1}, "b": {"x": 2}}}
      >>> configs = {"a": RandLoraConfig(), "b": RandLoraConfig(randlora_alpha=32)}
      >>> one, config = select(variables, configs, "b")
      >>> one["randlora"], config.randlora_alpha
      ({'x': 2}, 32)
    """
    if name not in named(config):
        raise ValueError(f"there is no adapter {name!r}, only {sorted(named(config))}")
    if not isinstance(config, Mapping):
        return dict(variables), config
    return {**variables, "randlora": variables["randlora"][name]}, config[name]


def insert(
    variables: trees.Tree, config: Configs, name: str, added: trees.Tree, added_config: Configs
) -> tuple[dict[str, Any], dict[str, RandLoraConfig]]:
    """Adds an adapter, as `adapt` or `load_adapter` returned it, to others by name.

    Nothing is copied, and nothing that is there changes. To delete one, leave it out of both.

    Raises:
      ValueError: if the name is taken, or if the two can't be on the same bases.
    """
    if not isinstance(config, Mapping):
        raise TypeError("config must name its adapters: {'name': config}, as must 'randlora'")
    if name in config:
        raise ValueError(f"there is an adapter {name!r} already: {sorted(config)}")
    configs = {**config, name: added_config}
    check_names(configs, None)
    bases = [tree["randlora_bases"] for tree in (variables, added)]
    # The larger pair serves both, since the smaller is its prefix.
    small, large = sorted(bases, key=lambda b: (b["randlora_B"].size, b["randlora_A"].size))
    for key, array in small.items():
        part = large[key][tuple(slice(n) for n in array.shape)]
        if part.shape != array.shape or not bool((part == array).all()):
            raise ValueError(
                f"{key} of {name!r} is not that of the adapters {sorted(config)}: they were not "
                "drawn in the same way"
            )
    scales = {**variables["randlora"], name: added["randlora"]}
    return {**variables, "randlora": scales, "randlora_bases": dict(large)}, configs


def initial_scales(
    config: RandLoraConfig, found: Mapping[trees.Path, Kernel], shapes: trees.Tree
) -> dict[str, Any]:
    """PEFT's start: lambda 0 and gamma 1 / max of its shape; or lambda normal, gamma 1 / max."""

    def start(path, leaf):
        kernel = found[path[:-1]]
        struct = nn.unbox(leaf)
        if path[-1] == SCALES[1]:
            sides = kernel.scale_shapes(config.r)[1] if config.init_weights else kernel.sides
            value = jnp.full(struct.shape, 1 / max(sides), struct.dtype)
        elif config.init_weights:
            value = jnp.zeros(struct.shape, struct.dtype)
        else:
            key = trees.key_of(config.projection_prng_key, path)
            value = jax.random.normal(key, struct.shape, struct.dtype)
        return nn.meta.replace_boxed(leaf, value)

    return trees.map_with_path(start, shapes)


def cut_stacks(found: dict[trees.Path, Kernel], shapes: trees.Tree, config: RandLoraConfig):
    """Drops from traced scales the layers of stacks that `layers_to_transform` leaves out.

    Args:
      found: the kernels by the path of their scales.
      shapes: the scales as the model would store them, for whole stacks.

    Returns:
      (found, shapes): stacked scales have one row for each layer that is adapted.
    """
    kept: dict[trees.Path, Any] = {}
    for path, leaf in trees.items(shapes):
        layers = rows(config, path[:-1])
        if layers is None:
            kept[path] = leaf
            continue
        struct = nn.unbox(leaf)
        if struct.ndim == 2:
            continue  # in no stack, and without a number: in no layer, as PEFT sees it
        one = found[path[:-1]].scale_shapes(config.r)[SCALES.index(path[-1])]
        if struct.ndim == 3 and struct.shape[1:] != one:
            raise ValueError(
                f"layers_to_transform={config.layers_to_transform!r} counts layers along the first "
                f"axis, and {targets.name_of(path[:-1])!r} is stacked along another: set it to "
                "None, or the stack's variable_axes to {'params': 0}"
            )
        if struct.ndim > 3 or layers[-1] >= struct.shape[0]:
            raise ValueError(
                f"layers_to_transform={config.layers_to_transform!r} does not fit the stack "
                f"{targets.name_of(path[:-1])!r} of {struct.shape[:-2]} layers"
            )
        cut = jax.ShapeDtypeStruct((len(layers), *struct.shape[1:]), struct.dtype)
        kept[path] = nn.meta.replace_boxed(leaf, cut)
    layers = {path[:-1] for path in kept}
    if not layers:
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform!r} with layers_pattern="
            f"{config.layers_pattern!r} leaves no layer: no path has a layer number or a stack"
        )
    return {path: kernel for path, kernel in found.items() if path in layers}, trees.build(kept)


def beside_kernels(params: trees.Tree, scales: trees.Tree, config: RandLoraConfig, suffix: str):
    """Parameters with the scales beside their kernels, where the model's own transforms carry them.

    Layers of a stack that are not adapted get zeros.
    """
    kernels = dict(trees.items(params))
    added = {}
    for path, leaves in pairs(scales):
        layers = rows(config, path)
        for label, leaf in zip(SCALES, leaves, strict=True):
            if layers:
                value, kernel = nn.unbox(leaf), nn.unbox(kernels[parse_label(path)[0]])
                whole = jnp.zeros((kernel.shape[0], *value.shape[1:]), value.dtype)
                leaf = nn.meta.replace_boxed(leaf, whole.at[jnp.array(layers)].set(value))
            added[(*path, label + suffix)] = leaf
    return trees.union(params, trees.build(added))


def rows(config: RandLoraConfig, path: trees.Path) -> tuple[int, ...] | None:
    """The layers of a stack that scales have rows for, None if for all."""
    where = parse_label(path)[0]
    cut = targets.wanted(config, targets.name_of(where[:-1])) is None
    return targets.layer_indices(config) if cut else None
