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
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Factors = tuple[str, ...]  # a name for each dimension of an array; equal names are equal sizes
Axes = tuple[str, ...]  # axes of a mesh


@dataclasses.dataclass(frozen=True)
class Division:
    """How dimensions of operands and results belong together.

    Attributes:
      operands, results: the factors of each array. Where operands disagree on a factor's axes, the
        first operand is followed.
      sums: for each result, the factors over which the parts of devices are to be summed.
      first: factors whose axes are decided before all others'.
      whole: factors that are never divided.
      apart: for each operand and then each result, a suffix that keeps the compiler from giving it
        the axes of arrays with another suffix, unasked. Bases that every device holds would be cut
        up like a kernel, only to be gathered again; each device can take its part when it wants.
    """

    operands: tuple[Factors, ...]
    results: tuple[Factors, ...]
    sums: tuple[Factors, ...]
    first: Factors = ()
    whole: Factors = ()
    apart: tuple[str, ...] = ()

    def assign(
        self, shapes: Sequence[tuple[int, ...]], specs: Sequence[P], sizes: dict[str, int]
    ) -> dict[str, Axes]:
        """The axes that divide each factor; an axis divides one factor only."""
        axes: dict[str, Axes] = {}
        used: set[str] = set()
        for only_first in (True, False):
            for factors, shape, spec in zip(self.operands, shapes, specs, strict=True):
                for factor, size, entry in zip(factors, shape, tuple(spec), strict=False):
                    entry = () if entry in (None, P.UNCONSTRAINED) else entry
                    entry = (entry,) if isinstance(entry, str) else tuple(entry)
                    free = tuple(a for a in entry if a not in used)
                    if (factor in self.first) != only_first or factor in self.whole:
                        continue
                    parts = math.prod(sizes[a] for a in free)
                    if factor not in axes and free and size % parts == 0:
                        axes[factor] = free
                        used.update(free)
        return axes

    def rule(self) -> str:
        """As Shardy wants it, "a b, b c -> a c"."""
        arrays = (*self.operands, *self.results)
        named = [
            " ".join(f if f in self.whole else f + suffix for f in factors)
            for factors, suffix in zip(arrays, self.apart or ("",) * len(arrays), strict=True)
        ]
        count = len(self.operands)
        return f"{', '.join(named[:count])} -> {', '.join(named[count:])}"


def per_device(function: Callable, division: Division, *operands: jax.Array) -> tuple:
    """`function(*operands)`, computed by each device on its part.

    Args:
      function: hashable; returns a tuple of arrays, partial where the division names sums.
      division: of `operands` and results.
    """
    mesh = jax.typeof(operands[0]).sharding.mesh
    types = set(mesh.axis_types) if not mesh.empty else set()
    if AxisType.Manual in types or (AxisType.Explicit not in types and jax.device_count() == 1):
        return function(*operands)
    if AxisType.Explicit in types:
        return _mapped(function, division, mesh, operands)
    return _told_by_compiler(function, division)(*operands)


def like(value: jax.Array, other: jax.Array) -> jax.Array:
    """The value, divided as the other's type says, as a gradient must be."""
    sharding = jax.typeof(other).sharding
    explicit = AxisType.Explicit in (sharding.mesh.axis_types or ())
    return jax.sharding.reshard(value, sharding) if explicit else value


def _specs(factors: Sequence[Factors], axes: dict[str, Axes]) -> tuple[P, ...]:
    return tuple(P(*(axes.get(factor) for factor in array)) for array in factors)


def _summed(function, division, axes):
    def run(*operands):
        results = function(*operands)
        totals = []
        for result, factors in zip(results, division.sums, strict=True):
            over = tuple(a for factor in factors for a in axes.get(factor, ()))
            totals.append(jax.lax.psum(result, over) if over else result)
        return tuple(totals)

    return run


def _mapped(function, division, mesh, operands):
    explicit = {
        a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }  # fmt: skip
    shapes = [x.shape for x in operands]
    axes = division.assign(shapes, [jax.typeof(x).sharding.spec for x in operands], mesh.shape)
    specs = _specs(division.operands, axes)
    run = jax.shard_map(
        _summed(function, division, axes),
        mesh=mesh,
        in_specs=specs,
        out_specs=_specs(division.results, axes),
        axis_names=explicit,
        check_vma=False,
    )
    placed = (jax.sharding.reshard(x, spec) for x, spec in zip(operands, specs, strict=True))
    return run(*placed)


@functools.lru_cache(maxsize=4096)
def _told_by_compiler(function, division):
    def partition(mesh, arguments, results):
        del results
        axes: dict[str, Axes] = {}
        if mesh.empty:  # there are several devices, but nothing that divides anything among them
            mesh = Mesh(np.array(list(arguments[0].sharding.device_set)), ("all",))
        else:
            specs = [a.sharding.spec for a in arguments]
            axes = division.assign([a.shape for a in arguments], specs, mesh.shape)
        placed = [
            tuple(NamedSharding(mesh, spec) for spec in _specs(arrays, axes))
            for arrays in (division.results, division.operands)
        ]
        return mesh, _summed(function, division, axes), *placed

    divided = custom_partitioning(lambda *operands: function(*operands))
    in_order = dict.fromkeys(factor for array in division.operands for factor in array)
    divided.def_partition(
        partition,
        sharding_rule=division.rule(),
        need_replication_factors=tuple(f for f in in_order if f in division.whole),
    )

    # Neither vmap nor a further derivative has a rule for it: they see the undivided function.
    mappable = custom_vmap(lambda *operands: divided(*operands))

    @mappable.def_vmap
    def _(size, batched, *operands):
        del size
        results = jax.vmap(function, [0 if b else None for b in batched])(*operands)
        return results, (True,) * len(results)

    run = jax.custom_jvp(lambda *operands: mappable(*operands))
    run.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return run
