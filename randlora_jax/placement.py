"""Arrays where others are: on the same mesh, divided as they are, or whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Axes = tuple[str, ...]  # axes of a mesh


def mesh_axes(entry: Any) -> Axes:
    """The mesh's axes in one entry of a PartitionSpec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def fitting(
    axes: Sequence[Any], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> tuple[Any, ...]:
    """The entries of a spec that divide the sizes: some rows of a stack may be too few for it."""
    parts = lambda entry: math.prod(mesh.shape[axis] for axis in mesh_axes(entry))
    return tuple(a if n % parts(a) == 0 else None for a, n in zip(axes, shape, strict=True))


def has_values(array: Any) -> bool:
    """Whether it is neither abstract nor traced."""
    return not isinstance(array, (jax.ShapeDtypeStruct, Tracer))


def placed_like(old: Any, new: Any) -> Any:
    """The new array where the old one is, if that is on a mesh, as far as its sizes divide."""
    sharding = getattr(old, "sharding", None)
    if not (has_values(old) and has_values(new) and isinstance(sharding, NamedSharding)):
        return new
    axes = (*sharding.spec, *[None] * (new.ndim - len(sharding.spec)))
    spec = PartitionSpec(*fitting(axes, new.shape, sharding.mesh))
    return jax.device_put(new, NamedSharding(sharding.mesh, spec))


def beside(old: Any, new: Any) -> Any:
    """The new array whole on each device of the mesh that the old one is on, if on one."""
    sharding = getattr(old, "sharding", None)
    if not (has_values(old) and has_values(new) and isinstance(sharding, NamedSharding)):
        return new
    if getattr(new.sharding, "mesh", None) == sharding.mesh:
        return new
    return jax.device_put(new, NamedSharding(sharding.mesh, PartitionSpec()))


def whole(array: jax.Array) -> jax.Array:
    """An array that is divided by its type, on a mesh with explicit axes, whole on each device.

    Otherwise nothing of another division could be computed with it.
    """
    sharding = jax.typeof(array).sharding
    if not any(sharding.spec) or AxisType.Explicit not in sharding.mesh.axis_types:
        return array
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec()))


def automatic(function: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """A function whose division is the compiler's business, also where types say how `like` is."""
    sharding = jax.typeof(like).sharding
    if AxisType.Explicit not in (sharding.mesh.axis_types or ()):
        return function
    return jax.sharding.auto_axes(function, out_sharding=sharding)
