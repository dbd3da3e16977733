"""Running a function of arrays on each device's part of them, with sums across devices named.

The partitioner of XLA would sum the product of activations and cotangents, a whole kernel, across
devices before it is contracted to the scales' small gradients. Here each device contracts first.
The operands' shardings decide how they are divided: read from their types on meshes with explicit
axes, and told by the compiler on meshes with automatic ones.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Factors = tuple[str, ...]  # a name for each dimension of an array; equal names are equal sizes
Axes = tuple[str, ...]  # axes of a mesh
Arrays = dict[str, jax.Array]


_MAPPED = "v"  # how the names of factors begin that `jax.vmap` adds


@dataclasses.dataclass(frozen=True)
class Part:
    """How one array is divided.

    Attributes:
      factors: of its dimensions.
      sums: of a result: the factors over which the parts of devices are to be summed.
      group: arrays of different groups don't get each other's axes from the compiler, unasked,
        but for those of tokens. Bases that every device holds would be cut up like a kernel, only
        to be gathered again; each device can take its part when it wants.
    """

    factors: Factors
    sums: Factors = ()
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Division:
    """How the dimensions of operands and results belong together.

    Attributes:
      operands, results: (name, part) of each array. Where operands disagree on a factor's axes,
        the first operand is followed.
      first: factors that have an axis rather than others that have it as often.
      told: the axes of factors, as somebody says them.
      undivided: factors that are never divided.
    """

    operands: tuple[tuple[str, Part], ...]
    results: tuple[tuple[str, Part], ...]
    first: Factors = ()
    undivided: Factors = ()
    told: tuple[tuple[str, Axes], ...] = ()

    def assign(
        self,
        shapes: Sequence[tuple[int, ...]],
        specs: Sequence[P],
        sizes: Mapping[str, int],
        *,
        by_type: bool = False,
    ) -> dict[str, Axes]:
        """The axes that divide each factor; an axis divides one factor only.

        That is the one by which it divides the most elements already: all other arrays that have
        the axis are gathered. With `by_type`, what is told comes before that, and then the first
        factors: where the specs are types, those of results must not depend on sizes.

        Args:
          shapes, specs: of the operands, and of the results, where their specs are known.
          sizes: of the mesh's axes.
        """
        told = {axis: factor for factor, axes in self.told for axis in axes}
        held: dict[str, dict[str, int]] = {}  # by axis and factor: elements
        length: dict[str, int] = {}
        entries: dict[str, list[Axes]] = {}
        parts = [part for _, part in (*self.operands, *self.results)]
        for part, shape, spec in zip(parts, shapes, specs, strict=False):
            for factor, size, entry in zip(part.factors, shape, tuple(spec), strict=False):
                length[factor] = size
                entries.setdefault(factor, []).append(mesh_axes(entry))
                for axis in () if factor in self.undivided else mesh_axes(entry):
                    of_axis = held.setdefault(axis, {})
                    of_axis[factor] = of_axis.get(factor, 0) + math.prod(shape)
        chosen: dict[str, set[str]] = {}
        for axis, of_axis in held.items():
            decided = {told.get(axis): -2, **dict.fromkeys(self.first, -1)} if by_type else {}
            by_size = sorted(of_axis, key=lambda f, of=of_axis: (-of[f], f not in self.first))
            for factor in sorted(by_size, key=lambda f, of=decided: of.get(f, 0)):
                wanted = {axis, *chosen.get(factor, ())}
                if length[factor] % math.prod(sizes[a] for a in wanted) == 0:
                    chosen[factor] = wanted
                    break
        # In the order in which most of them divide an array.
        for entry in entries.values():
            entry.sort(key=len, reverse=True)
        in_order = lambda factor: dict.fromkeys(a for entry in entries[factor] for a in entry)
        return {f: tuple(a for a in in_order(f) if a in axes) for f, axes in chosen.items()}

    def specs(self, axes: Mapping[str, Axes]) -> tuple[tuple[P, ...], tuple[P, ...]]:
        """The PartitionSpecs of operands and of results, if axes divide the factors so."""
        spec = lambda part: P(*(axes.get(factor) for factor in part.factors))
        operands, results = (
            tuple(spec(part) for _, part in arrays) for arrays in (self.operands, self.results)
        )
        return operands, results

    def mapped(self, names: frozenset[str]) -> Division:
        """That of `jax.vmap` over the first axis of these operands, and of all results."""
        factor = f"{_MAPPED}{sum(f.startswith(_MAPPED) for f in self.first)}"
        over = lambda part: dataclasses.replace(part, factors=(factor, *part.factors))
        return dataclasses.replace(
            self,
            operands=tuple((n, over(part) if n in names else part) for n, part in self.operands),
            results=tuple((n, over(part)) for n, part in self.results),
            first=(factor, *self.first),
        )

    def rule(self) -> str:
        """As Shardy wants it, "a b, b c -> a c"."""
        shared = {*self.first, *self.undivided}
        name = lambda factor, part: factor + ("" if factor in shared else part.group)
        left, right = (
            ", ".join(" ".join(name(f, part) for f in part.factors) for _, part in arrays)
            for arrays in (self.operands, self.results)
        )
        return f"{left} -> {right}"

    def summed(self, function: Callable, axes: Mapping[str, Axes]) -> Callable:
        """The function of arrays in order, its partial results summed over devices."""

        def run(*operands):
            results = self.in_order(function)(*operands)
            totals = []
            for result, (_, part) in zip(results, self.results, strict=True):
                over = tuple(a for factor in part.sums for a in axes.get(factor, ()))
                totals.append(jax.lax.psum(result, over) if over else result)
            return tuple(totals)

        return run

    def in_order(self, function: Callable) -> Callable:
        """A function of arrays by name as one of arrays in order, as JAX's transforms want it."""

        def run(*operands):
            named = {name: x for (name, _), x in zip(self.operands, operands, strict=True)}
            results = function(**named)
            return tuple(results[name] for name, _ in self.results)

        return run


def per_device(function: Callable[..., Arrays], division: Division, operands: Arrays) -> Arrays:
    """`function(**operands)`, computed by each device on its part.

    Args:
      function: hashable; returns arrays by name, partial where the division names sums.
      division: of operands and results.
      operands: by name; those that the division lacks are left out.
    """
    arrays = [operands[name] for name, _ in division.operands]
    mesh = jax.typeof(arrays[0]).sharding.mesh
    types = set(mesh.axis_types) if not mesh.empty else set()
    if AxisType.Manual in types or (AxisType.Explicit not in types and jax.device_count() == 1):
        results = division.in_order(function)(*arrays)
    elif AxisType.Explicit in types:
        results = _told_by_types(function, division, mesh, arrays)
    else:
        results = _told_by_compiler(function, division)(*arrays)
    return {name: x for (name, _), x in zip(division.results, results, strict=True)}


def varying_alike(operands: Arrays) -> Arrays:
    """The operands as arrays that all differ by device, if one does, within a `jax.shard_map`.

    With its default `check_vma=True` the types say it. Their gradients differ then too, and the
    transpose of the cast sums those of what was the same for all devices.

    Raises:
      ValueError: for a kernel that is divided by hand, whose update nothing here can tell.
    """
    varying = {name: jax.typeof(a).mat.varying for name, a in operands.items()}
    of_kernel = varying.get("kernel", frozenset())
    alone = of_kernel - varying["x"] - varying["lam"] - varying["gamma"]
    if alone:
        shape, axes = operands["kernel"].shape, sorted(alone)
        raise ValueError(
            f"a kernel of shape {shape} differs by device along {axes}, and its input and its "
            "scales don't: a part of a kernel, divided by hand within jax.shard_map, has no update "
            "of its own. Leave that axis to the compiler: jax.shard_map(..., axis_names=...) "
            "without it"
        )
    every = frozenset().union(*varying.values())
    return {
        name: jax.lax.pcast(a, tuple(every - varying[name]), to="varying")
        if every - varying[name]
        else a
        for name, a in operands.items()
    }


def divided_like(value: jax.Array, other: jax.Array) -> jax.Array:
    """The value, divided as the other's type says, as a gradient must be."""
    sharding = jax.typeof(other).sharding
    explicit = AxisType.Explicit in (sharding.mesh.axis_types or ())
    return jax.sharding.reshard(value, sharding) if explicit else value


def _told_by_types(function, division: Division, mesh, operands):
    shapes = [x.shape for x in operands]
    specs = [jax.typeof(x).sharding.spec for x in operands]
    axes = division.assign(shapes, specs, mesh.shape, by_type=True)
    in_specs, out_specs = division.specs(axes)
    # No others: a `jax.vmap` around us has axes for itself, and does not say which.
    used = {axis for spec in in_specs for entry in spec for axis in mesh_axes(entry)}
    # By the mesh too, which need not be the current one.
    placed = (NamedSharding(mesh, spec) for spec in in_specs)
    operands = [jax.sharding.reshard(x, s) for x, s in zip(operands, placed, strict=True)]
    if not used:
        return division.in_order(function)(*operands)
    run = jax.shard_map(
        division.summed(function, axes),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=used,
        check_vma=False,
    )
    return run(*operands)


def mesh_axes(entry: Any) -> Axes:
    """The mesh's axes in one entry of a PartitionSpec."""
    if entry is None or entry is P.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


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

    mappable = custom_vmap(lambda *operands: divided(*operands))

    @mappable.def_vmap
    def _(size, batched, *operands):
        del size
        flags = zip(division.operands, batched, strict=True)
        names = frozenset(name for (name, _), is_batched in flags if is_batched)
        mapped = _told_by_compiler(_Mapped(function, names), division.mapped(names))
        return mapped(*operands), (True,) * len(division.results)

    # A further derivative has no rule for it: it sees the undivided function.
    run = jax.custom_jvp(lambda *operands: mappable(*operands))
    run.defjvp(lambda primals, tangents: jax.jvp(in_order, primals, tangents))
    return run
