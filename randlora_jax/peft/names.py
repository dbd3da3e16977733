"""From a torch module's name to a place in a Flax tree and back, and from weight to kernel."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Mapping
from typing import Any

import numpy as np

from randlora_jax import trees
from randlora_jax.equations import KernelAxes
from randlora_jax.peft.name_maps import Place, parts_of
from randlora_jax.sites import parse_label

Names = Callable[[str], Any] | Mapping[str, Any] | None
NameOf = Callable[[trees.Path, int | None], str | None]  # the way back, from a place
Shapes = Mapping[trees.Path, tuple[int, ...]]  # of the base's parameters


def place_of(name_map: Names, name: str) -> Place:
    """Where a module is in `params`.

    Raises:
      ValueError: if the map has no place for it, or gives something else.
    """
    value: Any
    if name_map is None:
        value = name
    elif isinstance(name_map, Mapping):
        value = name_map.get(name)
    else:
        try:
            value = name_map(name)
        except KeyError:
            value = None
    if value is None:
        raise ValueError(
            f"name_map has no place for {name!r}: the adapter is of another model{of_inner(name)}"
        )
    path: Any = value
    index: int | None = None
    if isinstance(value, (tuple, list)) and len(value) == 2 and hasattr(value[1], "__index__"):
        path, index = value[0], int(value[1])
    path = parts_of(path) if isinstance(path, str) else path
    good = isinstance(path, (tuple, list)) and all(isinstance(part, str) for part in path)
    if not good or any(not part or re.search(r"[/\\\0]", part) for part in path):
        raise ValueError(
            f"name_map gives {value!r} for {name!r}: wanted a dotted path, a tuple of its parts, "
            "or (path, index) where layers are stacked"
        )
    if index is not None and index < 0:
        raise ValueError(f"name_map gives the index {index} for {name!r}: it counts from 0")
    return tuple(path), index


def of_inner(name: str) -> str:
    """What to write where a name is of a language model within another model, for messages."""
    inner = re.match(r"(?:.*\.)?language_model(?:\.model)?(?=\.)", name)
    if inner is None:
        return ""
    return f". If it has yours within, a map has .moved('model', {inner[0]!r})"


def inverse(name_map: Names) -> NameOf | None:
    """The way back of a map, from a place to a name; None for a function that has no `inverse`."""
    if name_map is None:
        return lambda path, index: ".".join(path) if index is None else None
    if isinstance(name_map, Mapping):
        names: dict[Place, str] = {}
        for name in name_map:
            path, index = place_of(name_map, name)
            scales, where = kernel_at(path)
            for key in {path, scales, where[:-1]}:
                if names.setdefault((key, index), name) != name and key in (path, scales):
                    other = names[key, index]
                    raise ValueError(f"name_map gives one place for {other!r} and for {name!r}")
        return lambda path, index: names.get((path, index))
    return getattr(name_map, "inverse", None)


def kernel_at(
    path: trees.Path, params: Container[trees.Path] = ()
) -> tuple[trees.Path, trees.Path]:
    """(path of the scales, path of the kernel)."""
    where, axes = parse_label(path, params)
    plain = axes is not None and axes == KernelAxes((), tuple(range(len(axes.inputs))))
    if plain and where[-1] == "kernel":
        return where[:-1], where  # such scales sit beside their kernel, without a label
    return path, where


def leaf_at(module: trees.Path, leaf: str, shapes: Shapes) -> trees.Path:
    """The parameter that torch calls `leaf`: a weight is a kernel, an embedding or a scale."""
    names = (*_WEIGHTS, leaf) if leaf == "weight" else (leaf,)
    return next((p for n in names if (p := (*module, n)) in shapes), (*module, names[0]))


def leaf_of(path: trees.Path) -> str:
    """The inverse of `leaf_at`: torch's name of a Flax parameter."""
    return "weight" if path[-1] in _WEIGHTS else path[-1]


_WEIGHTS = ("kernel", "embedding", "scale")


def from_torch(
    value: np.ndarray, path: trees.Path, shape: tuple[int, ...], conv1d: bool
) -> np.ndarray:
    """A torch parameter in the shape of the Flax one at `path`.

    Args:
      conv1d: whether the weight may be transformers' Conv1D's, (in, out), in place of nn.Linear's.

    Raises:
      ValueError: if it does not fit, or if a square weight could be either.
    """
    if path[-1] == "kernel" and value.ndim == 2:
        for k in range(1, len(shape)):
            sides = math.prod(shape[:k]), math.prod(shape[k:])
            if value.shape == sides[::-1]:
                _refuse_square(path, sides, conv1d)
                return value.T.reshape(shape)
            if conv1d and value.shape == sides:
                return value.reshape(shape)
    elif value.shape == shape or (value.ndim == 1 and value.size == math.prod(shape)):
        return value.reshape(shape)
    if path[-1] == "kernel" and value.ndim > 2 and sorted(value.shape) == sorted(shape):
        raise ValueError(
            f"it has {value.shape} for {'.'.join(path)!r} of {shape}, which looks like a "
            "convolution, and those are not exchanged: leave it out of modules_to_save"
        )
    raise ValueError(
        f"it has {value.shape} for {'.'.join(path)!r} of {shape}: it is of another model"
        + ", or of a vocabulary that was resized after loading: give the base as many rows"
        * (path[-1] == "embedding" and value.shape[1:] == shape[1:])
    )


def to_torch(value: np.ndarray, path: trees.Path, outputs: int | None, conv1d: bool) -> np.ndarray:
    """The inverse of `from_torch`; kernels become nn.Linear's weights, (out, in).

    Args:
      outputs: how many axes of a kernel are outputs, None where only its two axes tell.

    Raises:
      ValueError: where that is not known, or a square weight could be Conv1D's.
    """
    if path[-1] == "kernel":
        outputs = 1 if value.ndim == 2 else outputs
        if not outputs:
            raise ValueError(
                f"{'.'.join(path)!r} is a kernel of {value.shape} without a bias, which does not "
                "tell its inputs from its outputs: leave it out of modules_to_save"
            )
        sides = math.prod(value.shape[:-outputs]), math.prod(value.shape[-outputs:])
        _refuse_square(path, sides, conv1d)
        return value.reshape(sides).T
    return value.reshape(-1) if path[-1] in ("bias", "scale") else value


def _refuse_square(path, sides, conv1d):
    if conv1d and sides[0] == sides[1]:
        raise ValueError(
            f"with fan_in_fan_out=True the weight of {'.'.join(path)!r}, {sides}, may be that of "
            "an nn.Linear or of a Conv1D, its transpose, and nothing tells: leave it out of "
            "modules_to_save"
        )
