"""An injected NNX model's arrays: as the trees that all of `randlora_jax` takes, and as filters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from randlora_jax import adapters, targets, training, trees
from randlora_jax.config import RandLoraConfig
from randlora_jax.kernels import SCALES
from randlora_jax.nnx.classes import adapted_modules, bases_of
from randlora_jax.nnx.layers import RandLoraBasis, RandLoraParam, scales_of

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
      >>> jax.tree.map(jnp.shape, variables(model))["randlora"]
      {'randlora_gamma': (2, 3), 'randlora_lambda': (2, 2)}
    """
    if "randlora_config" not in vars(model):
        return base_variables(model)
    leaves = {}
    for path, variable, rows in _scales(model):
        value = variable.get_value()
        leaves[path] = value if rows is None else _evaluate(lambda v, i=rows: v[i], value)
    scales = trees.build(leaves)
    return {**base_variables(model), "randlora": scales, "randlora_bases": bases_of(model)}


def update(model: nnx.Module, values: trees.Tree) -> None:
    """Puts arrays into an injected model: the inverse of `variables`.

    Args:
      values: like `variables(model)`; "params" can be left out, or have only those that change.

    Raises:
      ValueError: if paths or shapes are others, before anything is changed.
    """
    now = variables(model)
    for collection in ("randlora", "randlora_bases"):
        check_same(values[collection], now[collection])
    params = dict(trees.items(values.get("params", {})))
    known = dict(trees.items(now["params"]))
    check_same(trees.build(params), trees.build({k: v for k, v in known.items() if k in params}))
    set_params(model, values.get("params", {}))
    scales = dict(trees.items(values["randlora"]))
    for path, variable, rows in _scales(model):
        variable.set_value(spread(scales[path], rows, variable.shape[0]))
    for key, value in values["randlora_bases"].items():
        getattr(model, key).set_value(value)


def trainable(model: nnx.Module) -> nnx.filterlib.Filter:
    """The filter for what trains, for `nnx.Optimizer(wrt=...)` and `nnx.DiffState`.

    `RandLoraParam` alone, unless the config's `bias` or `modules_to_save` add parameters.

    Example:
      >>> from randlora_jax.nnx import inject
      >>> config = RandLoraConfig(r=2, target_modules="all-linear", bias="all")
      >>> model = inject(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), config)
      >>> sorted(path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, trainable(model))))
      ['bias', 'randlora_gamma', 'randlora_lambda']
    """
    config = config_of(model)
    if isinstance(config, Mapping) and len(config) > 1:
        return RandLoraParam  # several adapters train nothing else
    name, config = next(iter(adapters.named(config).items()))
    one, _ = adapters.select(variables(model), {name: config} if name else config, name)
    labels = dict(trees.items(training.labels(one, config)["params"]))
    paths = frozenset(path for path, label in labels.items() if label != training.FROZEN)
    return nnx.Any(RandLoraParam, _Paths(paths)) if paths else RandLoraParam


@dataclasses.dataclass(frozen=True)
class _Paths:
    """A filter with equality, which an optimizer that is an argument of `nnx.jit` needs."""

    paths: frozenset[trees.Path]

    def __call__(self, path, value) -> bool:
        return tuple(map(str, path)) in self.paths


def config_of(model: nnx.Module) -> RandLoraConfig | dict[str, RandLoraConfig]:
    """What the model was injected with.

    Raises:
      ValueError: if it was not.
    """
    config = vars(model).get("randlora_config")
    if config is None:
        raise ValueError(f"the {type(model).__name__} has no adapter: inject(model, config) first")
    return config if isinstance(config, RandLoraConfig) else dict(config)


def base_variables(model: nnx.Module) -> dict[str, Any]:
    """{"params": ...} of a model, injected or not."""
    state = nnx.state(model, nnx.All(nnx.Param, nnx.Not(RandLoraParam)))
    leaves = {tuple(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(state)}
    return {"params": trees.build(leaves)}


def set_params(model: nnx.Module, params: trees.Tree) -> None:
    """Sets those of a model's parameters that are others than now."""
    new = dict(trees.items(params))
    for path, variable in nnx.iter_graph(model):
        value = new.get(tuple(map(str, path))) if isinstance(variable, nnx.Param) else None
        if value is not None and value is not variable.get_value():
            variable.set_value(value)


def check_same(given: trees.Tree, expected: trees.Tree) -> None:
    """Raises a ValueError for trees whose paths or shapes differ."""
    given, expected = ({p: tuple(x.shape) for p, x in trees.items(t)} for t in (given, expected))
    for path in sorted(set(given) | set(expected)):
        if given.get(path) != expected.get(path):
            raise ValueError(
                f"{targets.name_of(path)!r} has the shape {given.get(path)} in what is given and "
                f"{expected.get(path)} in this model (None: it is not there): they are of another "
                "model or another config"
            )


def spread(value: Any, rows: tuple[int, ...] | None, size: int) -> Any:
    """Scales of some layers of a stack in their places among all; the others' are zero."""
    if rows is None:
        return value
    fill = lambda v: jnp.zeros((size, *v.shape[1:]), v.dtype).at[jnp.array(rows)].set(v)
    return _evaluate(fill, value)


def _scales(model) -> Iterator[tuple[trees.Path, nnx.Variable, Any]]:
    """(path in "randlora", variable, rows of the stack that have an update) of all scales."""
    named = adapters.named(config_of(model))
    for path, module in adapted_modules(model).items():
        for (kernel, suffix), pair in scales_of(module).items():
            name = suffix.removeprefix(":")
            where = (*map(str, path), *kernel.label)
            rows = adapters.rows(named[name], where)
            for scale, variable in zip(SCALES, pair, strict=True):
                full = (*((name,) if name else ()), *where, scale)
                yield full, variable, None if rows is None else jnp.array(rows)


def _evaluate(function, value):
    abstract = isinstance(value, jax.ShapeDtypeStruct)
    return jax.eval_shape(function, value) if abstract else function(value)
