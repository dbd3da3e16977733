"""An injected NNX model's arrays: as the trees that all of `randlora_jax` takes, and as filters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from randlora_jax import training, trees
from randlora_jax.adapters import named
from randlora_jax.bases import check_rank
from randlora_jax.config import RandLoraConfig
from randlora_jax.nnx.layers import RandLoraParam, has_scales, scales_of
from randlora_jax.nnx.lending import (
    STRENGTH,
    Arrays,
    RandLoraBasis,
    adapted_modules,
    bases_of,
    lend_again,
)
from randlora_jax.ops.dot_general import check_fit
from randlora_jax.placement import placed_like
from randlora_jax.sharding import spec_of
from randlora_jax.sites import SCALES, Stack, scale_name
from randlora_jax.stacks import part_of_stack

# The state that `inject` adds to a model's; all other state is as it was.
ADDED = nnx.Any(RandLoraParam, RandLoraBasis, nnx.PathContains("randlora_rngs"))


def variables(model: nnx.Module) -> dict[str, Any]:
    """An injected model's arrays as `RandLora.adapt` gives them: for everything in `randlora_jax`.

    Returns:
      {"params": ..., "randlora": ..., "randlora_bases": ...}; nothing is copied. Paths are
      strings: the third of a list of layers is "2". Of a model without adapters, "params" alone.

    Example:
      >>> from randlora_jax.nnx import inject
      >>> config = RandLoraConfig(r=2, target_modules="all-linear")
      >>> model = inject(nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0)), config)
      >>> jax.tree.map(jax.numpy.shape, variables(model))["randlora"]
      {'randlora_gamma': (2, 3), 'randlora_lambda': (2, 2)}
    """
    if "randlora_config" not in vars(model):
        return base_variables(model)
    leaves = {
        path: _evaluate(stack.adapted_part, variable.get_value())
        for path, variable, stack in _scales(model)
    }
    scales = trees.build(leaves)
    return {**base_variables(model), "randlora": scales, "randlora_bases": bases_of(model)}


def update(model: nnx.Module, values: trees.Tree) -> None:
    """Puts arrays into an injected model: the inverse of `variables`.

    Scales of a model that is on a mesh are divided as they were, and so are bases, unless those
    that are given are divided themselves.

    Args:
      values: like `variables(model)`; "params" can be left out, or have only those that change.

    Raises:
      ValueError: if paths or shapes are others, or bases too small, before anything is changed.
    """
    now, params = variables(model), values.get("params", {})
    check_same(values["randlora"], now["randlora"])
    _check_bases(model, values["randlora_bases"])
    check_params(params, now["params"])
    set_params(model, params)
    for path, variable, stack in _scales(model):
        value = spread(stack, trees.get(values["randlora"], path))
        variable.set_value(placed_like(variable.get_value(), value))
    for key, value in values["randlora_bases"].items():
        own = getattr(model, key)
        divided = any(spec_of(value))
        own.set_value(value if divided else placed_like(own.get_value(), value))
    lend_again(model)


def trainable(model: nnx.Module, names: tuple[str, ...] | None = None) -> nnx.filterlib.Filter:
    """The filter for what trains, for `nnx.Optimizer(wrt=...)` and `nnx.DiffState`.

    The scales of the active adapters, and what the config's `bias` or `modules_to_save` add.

    Args:
      model: an injected model.
      names: of several adapters, those to train instead.

    Raises:
      ValueError: for a name that is none of the adapters'.

    Example:
      >>> from randlora_jax.nnx import inject
      >>> config = RandLoraConfig(r=2, target_modules="all-linear", bias="all")
      >>> model = inject(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), config)
      >>> sorted(path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, trainable(model))))
      ['bias', 'randlora_gamma', 'randlora_lambda']
    """
    config = config_of(model)
    named.check(config, names)
    chosen = frozenset(active_of(model) if names is None else names)
    alone = isinstance(config, RandLoraConfig) and chosen
    # By name even if they are all: others may be inserted.
    scales = RandLoraParam if alone else nnx.All(RandLoraParam, _Adapters(chosen))
    labels = dict(trees.items(training.labels(variables(model), config, names)["params"]))
    paths = frozenset(path for path, label in labels.items() if label != training.FROZEN)
    return nnx.Any(scales, _Paths(paths)) if paths else scales


@dataclasses.dataclass(frozen=True)
class _Paths:
    """A filter with equality, which an optimizer that is an argument of `nnx.jit` needs."""

    paths: frozenset[trees.Path]

    def __call__(self, path, value) -> bool:
        return tuple(map(str, path)) in self.paths


@dataclasses.dataclass(frozen=True)
class _Adapters:
    """The same, of the scales of some adapters."""

    names: frozenset[str]

    def __call__(self, path, value) -> bool:
        del value
        return str(path[-1]).partition(":")[2] in self.names


def config_of(model: nnx.Module) -> RandLoraConfig | dict[str, RandLoraConfig]:
    """What the model was injected with.

    Raises:
      ValueError: if it was not.
    """
    config = vars(model).get("randlora_config")
    if config is None:
        raise ValueError(f"the {type(model).__name__} has no adapter: inject(model, config) first")
    return config if isinstance(config, RandLoraConfig) else dict(config)


def set_config(model: Any, config: named.Configs) -> None:
    """Notes at the root what `config_of` reads."""
    model.randlora_config = config if isinstance(config, RandLoraConfig) else tuple(config.items())


def active_of(model: nnx.Module) -> dict[str, RandLoraConfig]:
    """The adapters whose updates are summed."""
    layers = adapted_modules(model).values()
    return dict(next(layer.randlora_layer.adapters for layer in layers))


def strengths_of(model: nnx.Module) -> dict[str, Any]:
    """The strengths that were set, by the names of the adapters."""
    names = {name: scale_name(STRENGTH, name) for name in named.by_name(config_of(model))}
    there = vars(model)
    return {name: there[key].get_value() for name, key in names.items() if key in there}


def base_variables(model: nnx.Module) -> dict[str, Any]:
    """{"params": ...} of a model, injected or not."""
    state = nnx.state(model, nnx.All(nnx.Param, nnx.Not(RandLoraParam)))
    leaves = {tuple(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(state)}
    return {"params": trees.build(leaves)}


def set_params(model: nnx.Module, params: trees.Tree) -> None:
    """Sets those of a model's parameters that are others than now."""
    new = dict(trees.items(params))
    for path, variable in nnx.iter_graph(model, graph=True):
        value = new.get(tuple(map(str, path))) if isinstance(variable, nnx.Param) else None
        if value is not None and value is not variable.get_value():
            variable.set_value(value)


def _check_bases(model: nnx.Module, given: Arrays) -> None:
    """Raises a ValueError for bases of another kind, or that a layer would read beyond."""
    own = bases_of(model)
    if given.keys() != own.keys():
        check_same(given, own)
    for config in named.by_name(config_of(model)).values():
        check_rank(config, given)
    r = given["randlora_A"].shape[0]
    for path, module in adapted_modules(model).items():
        for kernel in module.randlora_layer.kernels:
            try:
                check_fit(given, kernel.features, kernel.scale_shapes(r))
            except ValueError as error:
                raise ValueError(f"{trees.shown((*path, *kernel.label))}: {error}") from None


def check_params(given: trees.Tree, own: trees.Tree) -> None:
    """Raises a ValueError for parameters that a model has not, or has of other shapes."""
    there = dict(trees.items(given))
    check_same(given, trees.filtered(own, lambda path, _: path in there))


def check_same(given: trees.Tree, expected: trees.Tree) -> None:
    """Raises a ValueError for trees whose paths or shapes differ."""
    shapes, wanted = ({p: tuple(x.shape) for p, x in trees.items(t)} for t in (given, expected))
    for path in sorted(set(shapes) | set(wanted)):
        if shapes.get(path) != wanted.get(path):
            raise ValueError(
                f"{trees.dotted(path)!r} has the shape {shapes.get(path)} in what is given and "
                f"{wanted.get(path)} in this model (None: it is not there): they are of another "
                "model or another config"
            )


def spread(stack: Stack, scales: Any) -> Any:
    """`Stack.spread`, of arrays or of abstract ones."""
    return _evaluate(stack.spread, scales)


def _scales(model: nnx.Module) -> Iterator[tuple[trees.Path, nnx.Variable, Stack]]:
    """(path in "randlora", variable, the stack if only some of its layers are adapted)."""
    configs = named.by_name(config_of(model))
    for module, adapted in adapted_modules(model).items():
        for kernel in adapted.randlora_layer.kernels:
            for adapter in (name for name in configs if has_scales(adapted, kernel, name)):
                stored = getattr(adapted, kernel.name).shape
                stack = part_of_stack(configs[adapter], module, stored)
                variables = scales_of(adapted, kernel, adapter)
                for scale, variable in zip(SCALES, variables, strict=True):
                    name = (adapter,) if adapter else ()
                    yield (*name, *module, *kernel.label, scale), variable, stack


def _evaluate(function, value):
    abstract = isinstance(value, jax.ShapeDtypeStruct)
    return jax.eval_shape(function, value) if abstract else function(value)
