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

import jax
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Factors = tuple[str, ...]  # a name for each dimension of an array; equal names are equal sizes
Axes = tuple[str, ...]  # axes of a mesh
Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Part:
    """How one array is divided.

    Attributes:
      factors: of its dimensions.
      sums: of a result: the factors over which the parts of devices are to be summed.
      group: arrays of different groups don't get each other's axes from the compiler, unasked.
        Bases that every device holds would be cut up like a kernel, only to be gathered again;
        each device can take its part when it wants.
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
      first: factors whose axes are decided before all others'.
      undivided: factors that are never divided.
    """

    operands: tuple[tuple[str, Part], ...]
    results: tuple[tuple[str, Part], ...]
    first: Factors = ()
    undivided: Factors = ()

    def assign(
        self, shapes: Sequence[tuple[int, ...]], specs: Sequence[P], sizes: Mapping[str, int]
    ) -> dict[str, Axes]:
        """The axes that divide each factor; an axis divides one factor only."""
        axes: dict[str, Axes] = {}
        used: set[str] = set()
        for only_first in (True, False):
            for (_, part), shape, spec in zip(self.operands, shapes, specs, strict=True):
                for factor, size, entry in zip(part.factors, shape, tuple(spec), strict=False):
                    entry = () if entry in (None, P.UNCONSTRAINED) else entry
                    entry = (entry,) if isinstance(entry, str) else tuple(entry)
                    free = tuple(a for a in entry if a not in used)
                    if (factor in self.first) != only_first or factor in self.undivided:
                        continue
                    parts = math.prod(sizes[a] for a in free)
                    if factor not in axes and free and size % parts == 0:
                        axes[factor] = free
                        used.update(free)
        return axes

    def specs(self, axes: Mapping[str, Axes]) -> tuple[tuple[P, ...], tuple[P, ...]]:
        """The PartitionSpecs of operands and of results, if axes divide the factors so."""
        spec = lambda part: P(*(axes.get(factor) for factor in part.factors))
        operands, results = (
            tuple(spec(part) for _, part in arrays) for arrays in (self.operands, self.results)
        )
        return operands, results

    def rule(self) -> str:
        """As Shardy wants it, "a b, b c -> a c"."""
        name = lambda factor, part: factor + ("" if factor in self.undivided else part.group)
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
    explicit = {
        a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }  # fmt: skip
    shapes = [x.shape for x in operands]
    axes = division.assign(shapes, [jax.typeof(x).sharding.spec for x in operands], mesh.shape)
    in_specs, out_specs = division.specs(axes)
    run = jax.shard_map(
        division.summed(function, axes),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=explicit,
        check_vma=False,
    )
    # By the mesh too, which need not be the current one.
    placed = (NamedSharding(mesh, spec) for spec in in_specs)
    return run(*(jax.sharding.reshard(x, s) for x, s in zip(operands, placed, strict=True)))


@functools.lru_cache(maxsize=4096)
def _told_by_compiler(function, division: Division):
    def partition(mesh, arguments, results):
        del results
        axes: dict[str, Axes] = {}
        if mesh.empty:  # there are several devices, but nothing that divides anything among them
            mesh = Mesh(np.array(list(arguments[0].sharding.device_set)), ("all",))
        else:
            specs = [a.sharding.spec for a in arguments]
            axes = division.assign([a.shape for a in arguments], specs, mesh.shape)
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

    # Neither vmap nor a further derivative has a rule for it: they see the undivided function.
    mappable = custom_vmap(lambda *operands: divided(*operands))

    @mappable.def_vmap
    def _(size, batched, *operands):
        del size
        results = jax.vmap(in_order, [0 if b else None for b in batched])(*operands)
        return results, (True,) * len(results)

    run = jax.custom_jvp(lambda *operands: mappable(*operands))
    run.defjvp(lambda primals, tangents: jax.jvp(in_order, primals, tangents))
    return run
