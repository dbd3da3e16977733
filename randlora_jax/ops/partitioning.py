"""Running a function of arrays on each device's part of them, with sums across devices named.

The partitioner of XLA would sum the product of activations and cotangents, a whole kernel, across
devices before it is contracted to the scales' small gradients. Here each device contracts first.
The operands' shardings decide how they are divided: read from their types on meshes with explicit
axes; on meshes with automatic ones told by the user, or else by the compiler, in a callback.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from randlora_jax.ops.division import Axes, Division
from randlora_jax.placement import mesh_axes

Arrays = dict[str, jax.Array]


def per_device(
    function: Callable[..., Arrays],
    division: Division,
    operands: Arrays,
    mesh: Mesh | AbstractMesh | None = None,
) -> Arrays:
    """`function(**operands)`, computed by each device on its part.

    Args:
      function: hashable; returns arrays by name, partial where the division names sums.
      division: of operands and results.
      operands: by name; those that the division lacks are left out.
      mesh: on which the division is told, if it is.
    """
    arrays = [operands[name] for name, _ in division.operands]
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]  # none where it is on no mesh
    current = next((mesh for mesh in meshes if not mesh.empty), meshes[0])
    types = set(current.axis_types) if not current.empty else set()
    if mesh is not None and AxisType.Explicit not in types:
        results = _told_by_user(function, division, mesh, arrays)
    elif AxisType.Manual in types or not (
        AxisType.Explicit in types or (jax.device_count() > 1 and not _symbolic(arrays))
    ):
        results = division.in_order(function)(*arrays)
    elif AxisType.Explicit in types:
        results = _mappable(_told_by_types, function, division, current)(*arrays)
    else:
        results = _mappable(_told_by_compiler, function, division)(*arrays)
    return {name: x for (name, _), x in zip(division.results, results, strict=True)}


def over_stack(
    function: Callable[..., Arrays], division: Division, count: int, shared: Container[str]
) -> tuple[Callable[..., Arrays], Division]:
    """A function and its division for stacks: with leading axes of all that is not shared."""
    names = frozenset(name for name, _ in division.operands if name not in shared)
    for _ in range(count):
        function, division = _Mapped(function, names), division.mapped(names)
    return function, division


def _symbolic(arrays: Sequence[jax.Array]) -> bool:
    """Whether a size among theirs is a symbol of `jax.export`."""
    return any(not isinstance(size, int) for array in arrays for size in array.shape)


def varying_alike(operands: Arrays) -> Arrays:
    """The operands as arrays that all differ by device, if one does, within a `jax.shard_map`.

    With its default `check_vma=True` the types say it. Their gradients differ then too, and the
    transpose of the cast sums those of what was the same for all devices.

    Raises:
      ValueError: for a kernel that is divided by hand, whose update nothing here can tell.
    """
    varying = {name: _varies(a) for name, a in operands.items()}
    alone = varying.get("kernel", frozenset())
    for name in ("x", "lam", "gamma"):
        alone -= varying.get(name, alone)  # without an update, a part of a kernel is as good
    if alone:
        shape, axes = operands["kernel"].shape, sorted(alone)
        raise ValueError(
            f"a kernel of shape {shape} differs by device along {axes}, and its input and its "
            "scales don't: a part of a kernel, divided by hand within jax.shard_map, has no update "
            "of its own. Leave that axis to the compiler: jax.shard_map(..., axis_names=...) "
            "without it"
        )
    every = frozenset().union(*varying.values())
    return {name: _varying(a, every) for name, a in operands.items()}


def _varies(array: jax.Array) -> frozenset[str]:
    """The axes of a user's `jax.shard_map` along which it differs by device."""
    kind = jax.typeof(array)
    return kind.vma if hasattr(kind, "vma") else kind.mat.varying  # before jax 0.10, and since


def _varying(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(axes - _varies(array))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def divided_like(value: jax.Array, other: jax.Array) -> jax.Array:
    """The value, divided as the other's type says, as a gradient must be."""
    sharding = jax.typeof(other).sharding
    explicit = AxisType.Explicit in (sharding.mesh.axis_types or ())
    return jax.sharding.reshard(value, sharding) if explicit else value


def _told_by_user(function, division: Division, mesh, operands):
    current = jax.sharding.get_abstract_mesh()
    elsewhere = isinstance(mesh, AbstractMesh) if current.empty else current.shape != mesh.shape
    if elsewhere:  # it is told of another mesh, or of one that is not there: the compiler may see
        return division.in_order(function)(*operands)
    mesh = mesh if current.empty else current
    by_hand = set(current.manual_axes)  # a `jax.shard_map` around us has divided along them
    sizes = {axis: size for axis, size in mesh.shape.items() if axis not in by_hand}
    axes = division.as_told([x.shape for x in operands], sizes)
    place = lambda x, spec: jax.lax.with_sharding_constraint(
        x, spec if mesh is current else NamedSharding(mesh, spec)
    )
    # Else the compiler would cut up the bases for one layer, and paste them for the next.
    operands = [
        place(x, PartitionSpec()) if part.whole else x
        for x, (_, part) in zip(operands, division.operands, strict=True)
    ]
    if _symbolic(operands):  # JAX crashes where it refines the shapes of an exported `shard_map`
        specs, of_results = division.specs(axes)
        parts = [part for _, part in division.operands]
        given = zip(operands, specs, parts, strict=True)
        operands = [x if part.whole else place(x, spec) for x, spec, part in given]
        results = division.in_order(function)(*operands)
        return [place(x, spec) for x, spec in zip(results, of_results, strict=True)]
    return _in_shard_map(function, division, mesh, axes, operands)


def _in_shard_map(function, division: Division, mesh, axes: Mapping[str, Axes], operands):
    in_specs, out_specs = division.specs(axes)
    # No others: a `jax.vmap` around us has axes for itself, and does not say which.
    used = {axis for spec in in_specs for entry in spec for axis in mesh_axes(entry)}
    if not used:
        return division.in_order(function)(*operands)
    run = jax.shard_map(
        division.summed(function, axes, _psum),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=used,
        check_vma=False,
    )
    # Within a `jax.shard_map` of a user's own, ours does not say that results differ by device.
    return [_varying(x, _varies(operands[0])) for x in run(*operands)]


def _psum(x: jax.Array, axes: Axes) -> jax.Array:
    """The sum over devices, in float32 on CPUs, where XLA's own way to do so can crash."""
    if x.dtype.itemsize >= 4:
        return jax.lax.psum(x, axes)
    wide = lambda x: jax.lax.psum(x.astype(np.float32), axes).astype(x.dtype)
    return jax.lax.platform_dependent(x, cpu=wide, default=lambda x: jax.lax.psum(x, axes))


def _told_by_types(function, division: Division, mesh):
    def run(*operands):
        shapes = [x.shape for x in operands]
        specs = [jax.typeof(x).sharding.spec for x in operands]
        axes = division.assign(shapes, specs, mesh.shape, by_type=True)
        in_specs, _ = division.specs(axes)
        # By the mesh too, which need not be the current one.
        where = (NamedSharding(mesh, spec) for spec in in_specs)
        placed = [jax.sharding.reshard(x, s) for x, s in zip(operands, where, strict=True)]
        return tuple(_in_shard_map(function, division, mesh, axes, placed))

    return run


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """`jax.vmap` of a function of arrays by name, over the first axis of some."""

    function: Callable[..., Arrays]
    names: frozenset[str]

    def __call__(self, **operands: jax.Array) -> Arrays:
        axes = {name: 0 if name in self.names else None for name in operands}
        return jax.vmap(lambda named: self.function(**named), (axes,))(operands)


@functools.lru_cache(maxsize=4096)
def _told_by_compiler(function, division: Division):
    def partition(mesh, arguments, results):
        axes: dict[str, Axes] = {}
        if mesh.empty:  # there are several devices, but nothing that divides anything among them
            mesh = Mesh(np.array(list(arguments[0].sharding.device_set)), ("all",))
        else:
            arrays = (*arguments, *results)
            specs = [a.sharding.spec for a in arrays]
            axes = division.assign([a.shape for a in arrays], specs, mesh.shape)
        placed = lambda specs: tuple(NamedSharding(mesh, spec) for spec in specs)
        in_specs, out_specs = division.specs(axes)
        return mesh, division.summed(function, axes), placed(out_specs), placed(in_specs)

    in_order = division.in_order(function)
    divided = custom_partitioning(lambda *operands: in_order(*operands))
    factors = dict.fromkeys(factor for _, part in division.operands for factor in part.factors)
    divided.def_partition(
        partition,
        sharding_rule=division.rule(),
        need_replication_factors=tuple(f for f in factors if f in division.undivided),
    )
    # A further derivative has no rule for it: it sees the undivided function.
    run = jax.custom_jvp(lambda *operands: divided(*operands))
    run.defjvp(lambda primals, tangents: jax.jvp(in_order, primals, tangents))
    return run


@functools.lru_cache(maxsize=4096)
def _mappable(divide: Callable, function: Callable[..., Arrays], division: Division, *others: Any):
    """`divide(function, division, *others)`, of which `jax.vmap` divides the mapped axis too."""
    mappable = custom_vmap(lambda *operands: divide(function, division, *others)(*operands))

    @mappable.def_vmap
    def _(size, batched, *operands):
        del size
        _refuse_old_jax(x for x, is_batched in zip(operands, batched, strict=True) if is_batched)
        flags = zip(division.operands, batched, strict=True)
        names = frozenset(name for (name, _), is_batched in flags if is_batched)
        mapped = _mappable(divide, _Mapped(function, names), division.mapped(names), *others)
        return mapped(*operands), (True,) * len(division.results)

    return mappable


def _refuse_old_jax(mapped: Iterable[jax.Array]) -> None:
    """Raises a ValueError where `jax.shard_map` of jax 0.8 could not divide a mapped axis."""
    first = (mesh_axes(spec[0]) for x in mapped if (spec := jax.typeof(x).sharding.spec))
    if jax.__version_info__ < (0, 9) and any(first):
        raise ValueError(
            f"jax {jax.__version__} can't map over an axis that is divided along explicit axes of "
            "a mesh: install jax>=0.9, or make the mesh with AxisType.Auto"
        )
