"""What trains and what is frozen: two trees for `jax.grad`, or labels for `optax.partition`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax

from randlora_jax import targets, trees
from randlora_jax.adapters import named
from randlora_jax.checks import check_config, check_variables
from randlora_jax.config import RandLoraConfig
from randlora_jax.quantised import is_quantised
from randlora_jax.sites import parse_label

FROZEN = "frozen"


def labels(
    variables: trees.Tree, config: named.Configs, names: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Names what each leaf is: the labels that `partition` gives a transformation each.

    Args:
      variables: as `adapt` returned them.
      config: the adapter's, or those of several by name.
      names: of several adapters, those that train; all by default. The others are frozen.

    Returns:
      A tree like `variables` of "randlora_lambda", "randlora_gamma", "bias" (as `config.bias`
      says), "modules_to_save" and "frozen".

    Example:
      >>> tree = {"params": {"kernel": 1.0, "bias": 2.0}, "randlora": {"randlora_lambda": 3.0}}
      >>> labels(tree, RandLoraConfig(bias="all"))["params"]
      {'bias': 'bias', 'kernel': 'frozen'}
    """
    check_variables(variables, "params", "randlora")
    check_config(config, several=True)
    named.check(config, names)
    trains, params = named.active(config, names), dict(trees.items(variables["params"]))
    several = isinstance(config, Mapping)
    configs = named.by_name(config)
    by_name = {name: named.scales_of(variables, name) for name in configs}
    # Several adapters train scales alone.
    one = next(iter(trains.values())) if trains and len(configs) == 1 else RandLoraConfig()
    scales = (path for tree in by_name.values() for path, _ in trees.items(tree))
    adapted = {parse_label(path[:-1], params)[0][:-1] for path in scales}

    def label(path, leaf):
        collection, *inside = path
        if collection == "randlora":
            return path[-1] if not several or path[1] in trains else FROZEN
        if collection != "params":
            return FROZEN
        if targets.is_saved_whole(one, trees.dotted(tuple(inside[:-1]))):
            if is_quantised(leaf):
                raise ValueError(
                    f"modules_to_save={one.modules_to_save} names {trees.dotted(tuple(inside))!r}, "
                    "which is quantised and can't train: give its module to exclude_modules of "
                    "quantize"
                )
            return "modules_to_save"
        everywhere, here = one.bias == "all", tuple(inside[:-1]) in adapted
        wanted = everywhere or (one.bias == "randlora_only" and here)
        return "bias" if wanted and inside[-1] == "bias" else FROZEN

    return trees.map_with_path(label, variables)


def split(
    variables: trees.Tree, config: named.Configs, names: tuple[str, ...] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides variables into what trains and all the rest, without copying an array.

    Differentiate a function of the first tree: no gradient of the base is ever formed then, and
    the optimizer holds state for the adapter alone.

    Args:
      variables: as `adapt` returned them.
      config: the adapter's, or those of several by name.
      names: of several adapters, those that train; all by default.

    Returns:
      (trainable, frozen), each a tree like `variables` with the other's leaves left out.

    Example:
      >>> tree = {"params": {"kernel": 1.0}, "randlora": {"randlora_lambda": 2.0}}
      >>> trainable, frozen = split(tree, RandLoraConfig())
      >>> trainable, frozen
      ({'randlora': {'randlora_lambda': 2.0}}, {'params': {'kernel': 1.0}})
      >>> combine(trainable, frozen) == tree
      True
    """
    by_path = dict(trees.items(labels(variables, config, names)))
    trainable = trees.filtered(variables, lambda path, _: by_path[path] != FROZEN)
    frozen = trees.filtered(variables, lambda path, _: by_path[path] == FROZEN)
    return trainable, frozen


def combine(trainable: trees.Tree, frozen: trees.Tree) -> dict[str, Any]:
    """The inverse of `split`."""
    return trees.union(frozen, trainable)


def partition(
    transforms: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    variables: trees.Tree,
    config: named.Configs,
    names: tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for the whole tree of variables that leaves everything frozen as it is.

    `optax.partition` over `labels`. It holds no state for what is frozen, but a loss that is
    differentiated over the whole tree can still compute gradients there: prefer `split`, where
    the choice is free.

    Args:
      transforms: one transformation for all that trains, or one for each label.
      variables, config, names: as for `split`.

    Raises:
      ValueError: if something trains that no transformation was given for.

    Example:
      >>> import jax.numpy as jnp
      >>> tree = {"params": {"kernel": jnp.ones(2)}, "randlora": {"randlora_gamma": jnp.ones(2)}}
      >>> tx = partition(optax.sgd(1.0), tree, RandLoraConfig())
      >>> updates, _ = tx.update(tree, tx.init(tree))
      >>> updates["params"]["kernel"].tolist(), updates["randlora"]["randlora_gamma"].tolist()
      ([0.0, 0.0], [-1.0, -1.0])
    """
    named_leaves = labels(variables, config, names)
    used = {label for _, label in trees.items(named_leaves)} - {FROZEN}
    by_label: dict[Any, optax.GradientTransformation] = {}
    by_label |= transforms if isinstance(transforms, Mapping) else dict.fromkeys(used, transforms)
    missing = sorted(used - set(by_label))
    if missing:
        raise ValueError(
            f"transforms has none for {missing}, which train: give one for each, or "
            "optax.set_to_zero()"
        )
    return optax.partition({FROZEN: optax.set_to_zero(), **by_label}, named_leaves)
