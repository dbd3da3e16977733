"""Weights of the base in an adapter's file: trained ones, and those that PEFT stores beside it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from randlora_jax import targets, trees
from randlora_jax.config import RandLoraConfig
from randlora_jax.peft.names import Names, Shapes, from_torch, kernel_at, leaf_at, place_of
from randlora_jax.peft.tensors import Adapter
from randlora_jax.quantised import is_quantised
from randlora_jax.sites import Stack
from randlora_jax.training import FROZEN, labels


def with_weights(
    adapter: Adapter,
    variables: trees.Tree,
    config: RandLoraConfig,
    stacks: Mapping[trees.Path, Stack],
    shapes: Shapes,
    name_map: Names,
) -> tuple[dict[str, Any], RandLoraConfig]:
    """The variables with an adapter's weights in the base's place, and the config that says so.

    Raises:
      ValueError: for a weight that has no place or does not fit, or one that is missing.
    """
    params = dict(trees.items(variables["params"]))
    places = _Places(params, shapes, name_map, config.fan_in_fan_out)
    saved = set()
    for (module, leaf), value in adapter.others.items():
        path = places.put(*places.find(module, leaf, value))
        if targets.is_saved_whole(adapter.config, module):
            saved.add(trees.dotted(path))
    if not all(targets.is_saved_whole(config, name) for name in saved):
        config = config.replace(modules_to_save=sorted(saved))
    _check_complete(variables, config, stacks, places)
    config = _beside(adapter, config, stacks, places)
    tell_of_shared_embeddings((p for p in places.new if p not in places.elsewhere), places.shapes)
    return {**variables, "params": trees.build(params | places.arrays())}, config


class _Places:
    """New values of the base's parameters, whole or layer by layer.

    Attributes:
      new: the values by path.
      given: which layers of each there were, {None} of what is in no stack.
      elsewhere: what the file has under another name too, as a shared output layer's.
    """

    def __init__(
        self, params: Mapping[trees.Path, Any], shapes: Shapes, name_map: Names, conv1d: bool
    ):
        self.params, self.shapes = params, shapes
        self.name_map, self.conv1d = name_map, conv1d
        self.new: dict[trees.Path, np.ndarray] = {}
        self.given: dict[trees.Path, set[int | None]] = {}
        self.elsewhere: set[trees.Path] = set()

    def find(
        self, module: str, leaf: str, value: np.ndarray
    ) -> tuple[trees.Path, int | None, np.ndarray]:
        """(path, layer, value) of a torch parameter."""
        path, index = place_of(self.name_map, module)
        at, kernel = kernel_at(path, self.shapes)
        path = kernel[:-1]
        if leaf == "weight" and at != path:
            raise ValueError(
                f"it has {module + '.weight'!r}, which has no place in {trees.dotted(at)!r}: only "
                "kernels that are called so and have their inputs first can be in modules_to_save"
            )
        where = leaf_at(path, leaf, self.shapes)
        if where not in self.shapes or (index is not None and index >= self.shapes[where][0]):
            raise ValueError(
                f"it has {module + '.' + leaf!r}, but the base no {trees.dotted(where)!r}"
            )
        shape = self.shapes[where] if index is None else self.shapes[where][1:]
        return where, index, from_torch(value, where, shape, self.conv1d)

    def put(self, where: trees.Path, index: int | None, value: np.ndarray) -> trees.Path:
        """Takes a value, in a dtype that rounds neither it nor the base's: the module's path."""
        old = trees.unboxed(self.params[where])
        dtype = np.promote_types(old.dtype, value.dtype)
        if index is None:
            self.new[where] = value.astype(dtype)
        else:
            if where not in self.new:
                self.new[where] = np.array(old).astype(dtype)
            self.new[where][index] = value
        self.given.setdefault(where, set()).add(index)
        return where[:-1]

    def is_there(self, where: trees.Path, index: int | None, value: np.ndarray) -> bool:
        """Whether a value is the base's or the new one, as far as the narrower dtype goes."""
        old = self.new[where] if where in self.new else trees.unboxed(self.params[where])
        old = old if index is None else old[index]
        dtypes = {jax.dtypes.canonicalize_dtype(array.dtype) for array in (old, value)}
        return any(bool((old.astype(t) == value.astype(t)).all()) for t in dtypes)

    def holding(self, value: np.ndarray) -> trees.Path | None:
        """Which parameter has a matrix's values, whatever it is called and however it lies."""
        for where, shape in self.shapes.items():
            may_be = value.ndim > 1 and math.prod(shape) == value.size
            if not may_be or is_quantised(self.params[where]):
                continue
            if any(self.is_there(where, None, v.reshape(shape)) for v in (value, value.T)):
                return where
        return None

    def arrays(self) -> dict[trees.Path, Any]:
        """The new values as arrays where the base's are, in their boxes."""
        arrays = {}
        for path, value in self.new.items():
            array = to_jax(value)
            sharding = getattr(trees.unboxed(self.params[path]), "sharding", None)
            array = array if sharding is None else jax.device_put(array, sharding)
            arrays[path] = nn.meta.replace_boxed(self.params[path], array)
        return arrays


def _check_complete(
    variables: trees.Tree,
    config: RandLoraConfig,
    stacks: Mapping[trees.Path, Stack],
    places: _Places,
) -> None:
    for path, label in trees.items(labels(variables, config)["params"]):
        stack, given = stacks.get(path[:-1]), places.given.get(path)
        trained: set[int | None] = {None}
        if given is not None and None not in given:
            of_layers = label == "bias" and config.bias == "randlora_only" and stack is not None
            layers = stack.layers if stack is not None and of_layers else None
            trained = set(layers or range(places.shapes[path][0]))
        if label != FROZEN and given != trained:
            raise ValueError(
                f"it lacks all or part of {trees.dotted(path)!r}, which its config trains"
            )


def _beside(
    adapter: Adapter,
    config: RandLoraConfig,
    stacks: Mapping[trees.Path, Stack],
    places: _Places,
) -> RandLoraConfig:
    """Takes those of the base's weights in the file that are not the base's here."""
    same, codes, changed, nowhere = [], [], {}, {}
    for (module, leaf), value in adapter.of_base.items():
        name = f"{module}.{leaf}"
        try:
            where, index, value = places.find(module, leaf, value)
        except ValueError as error:
            nowhere[name] = value, error
            continue
        if is_quantised(places.params[where]):
            codes.append(name)
        elif places.is_there(where, index, value):
            same.append(name)
        else:
            changed[name] = places.put(where, index, value)
    for name, (value, why) in nowhere.items():
        at = places.holding(value)  # among them what is new here
        if at is None:
            raise ValueError(
                f"{why}, and nothing in the base equals it. Neither modules_to_save="
                f"{adapter.config.modules_to_save!r} nor bias={adapter.config.bias!r} accounts "
                "for it"
            )
        places.elsewhere.add(at)
        same.append(name)
    for names, what in (
        (same, "equal to those here: passed over"),
        (codes, "of which there are codes here: passed over"),
    ):
        if names:
            warnings.warn(f"the file has weights of its base, {_some(names)}, {what}", stacklevel=5)
    adapted = sorted(name for name, path in changed.items() if path in stacks)
    whole = {trees.dotted(path) for path in changed.values() if path not in stacks}
    if changed:
        warnings.warn(
            f"the file has weights of its base, {_some(list(changed))}, that are not those here: "
            "they take their place"
            + (f", and the config returned has modules_to_save={sorted(whole)}" if whole else "")
            + (f". Keep `params` too: save_adapter does not save {_some(adapted)}" * bool(adapted)),
            stacklevel=5,
        )
    if whole:
        config = config.replace(modules_to_save=sorted(whole | set(config.modules_to_save or ())))
    return config


def tell_of_shared_embeddings(trained: Iterable[trees.Path], shapes: Shapes) -> None:
    """Warns of trained embeddings that may be the output layer too, as no tree can tell."""
    sizes = lambda path: sorted(shapes[path][-2:])
    for path in trained:
        alone = not any(
            p != path and len(shapes[p]) > 1 and sizes(p) == sizes(path) for p in shapes
        )
        if path[-1] == "embedding" and alone:
            warnings.warn(
                f"{trees.dotted(path)!r} is trained, and no output layer is beside it: a model "
                "that reads its logits off that embedding has others here than in PEFT, which "
                "trains a copy of it for the input alone",
                stacklevel=5,
            )


def _some(names: Sequence[str]) -> str:
    return repr(list(names[:3]))[1:-1] + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def to_jax(array: np.ndarray) -> jax.Array:
    """As it is: jax would make float32 of float64 without a word."""
    if array.dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError("it has float64 numbers: set jax_enable_x64 to read them as they are")
    return jax.numpy.asarray(array)
