"""Kernels that belong to no layer: raw parameters, asked for by their paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from randlora_jax import targets
from randlora_jax.registry import Axes, kernel_axes, outer_axes
from randlora_jax.sites import Kernel, Shape, Stack

Parameters = Mapping[str, Axes]  # by path, or suffix of one at a dot


def raw_kernels(
    module: str, values: Mapping[str, Any], parameters: Parameters
) -> dict[str, tuple[Kernel, Stack]]:
    """Those of a module's own parameters that are asked for by path, by their whole path.

    The axes that its equation does not have are those of a stack of layers, in front.

    Raises:
      ValueError: naming the parameter, if it is not of floating point numbers.
    """
    found = {}
    for label, value in values.items():
        path, shape = f"{module}.{label}" if module else label, tuple(value.shape)
        for pattern, use in parameters.items():
            if targets.names_module((pattern,), path):
                axes = outer_axes(use, shape)
                layer, sizes = Stack(axes).split(shape)
                kernel = _raw_kernel(path, label, layer, value.dtype, use)
                found[path] = kernel, Stack(axes, sizes)
    return found


def _raw_kernel(path: str, label: str, shape: Shape, dtype: Any, use: Axes) -> Kernel:
    try:
        axes = kernel_axes(f"its axes {use!r} must", use, shape)
        used = (*axes.stacked, *axes.inputs)
        if max(used) >= len(shape) or len(used) == len(shape):
            raise ValueError(
                f"of shape {shape} it can't have the input axes {axes.inputs}: some of its axes "
                "are inputs, and the others outputs"
            )
        return Kernel(shape, axes.inputs, label, dtype, axes.stacked)
    except ValueError as error:
        raise ValueError(f"parameters: {path!r}: {error}") from None


def check_parameters(
    parameters: Parameters, paths: Iterable[str], found: Iterable[str] | None = None
) -> None:
    """Raises a ValueError for a name of a raw parameter that matches none, or none that is adapted.

    Args:
      parameters: as users give them.
      paths: of all parameters.
      found: of those that are adapted, if that can be less.
    """
    names, adapted = list(paths), None if found is None else list(found)
    for pattern in parameters:
        matched = [name for name in names if targets.names_module((pattern,), name)]
        if not matched:
            raise ValueError(
                f"parameters: {pattern!r} matches no parameter; the nearest are "
                f"{targets.nearest(pattern, names)}"
            )
        if adapted is not None and not set(matched) & set(adapted):
            raise ValueError(
                f"parameters: {pattern!r} matches {matched[0]!r}, whose module does not run on "
                "these inputs: give adapt inputs, or a method, that run it; or whose axes are "
                f"others than in {parameters[pattern]!r}"
            )
