"""Which axes of a mesh divide which dimensions of the arrays of one product.

Dimensions that are equal by meaning, as x's last and the kernel's first, have one name, a factor;
an axis of the mesh divides one factor, and with it every array that has the factor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from randlora_jax.placement import Axes, mesh_axes

# A name for each dimension of an array; equal names are equal sizes, or tiles of them.
Factors = tuple[str, ...]


def _shared(size: Any, other: Any) -> Any:
    """What a division of both sizes has to divide: of tiles, their number. Symbols are alike."""
    return size if size is other or size == other else math.gcd(size, other)


def mapped_factor(number: int) -> str:
    """The name of a factor that `Division.mapped` adds, counted from the innermost."""
    return f"v{number}"


@dataclasses.dataclass(frozen=True)
class Part:
    """How one array is divided.

    Attributes:
      factors: of its dimensions.
      sums: of a result: the factors over which the parts of devices are to be summed.
      group: arrays of different groups don't get each other's axes from the compiler, unasked,
        but for those of tokens. Bases that every device holds would be cut up like a kernel, only
        to be gathered again; each device can take its part when it wants.
      whole: whether every device has all of it, or should; how it is divided decides nothing.
    """

    factors: Factors
    sums: Factors = ()
    group: str = ""
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Told:
    """How the arrays of one layer are divided, where a user tells it before compiling.

    Attributes:
      tokens: the axes of the mesh that divide each axis of tokens.
      kernel: and each of the kernel's axes, in the order in which it is given.
      stacked: and those of a kernel that is a stack itself.
      stack: all that divide the stack that the layer is in.
      bases: and the rows of `randlora_B`, which serve all layers.
    """

    mesh: Mesh | AbstractMesh
    tokens: tuple[Axes, ...]
    kernel: tuple[Axes, ...]
    bases: Axes = ()
    stacked: tuple[Axes, ...] = ()
    stack: Axes = ()

    def __reduce__(self) -> tuple[Any, ...]:
        devices_are_no_data = self.mesh.abstract_mesh
        others = self.tokens, self.kernel, self.bases, self.stacked, self.stack
        return Told, (devices_are_no_data, *others)


@dataclasses.dataclass(frozen=True)
class Division:
    """How the dimensions of operands and results belong together.

    Attributes:
      operands, results: (name, part) of each array.
      first: factors that have an axis rather than others that have it as often.
      undivided: factors that are never divided.
      told: the axes of factors as somebody says them, where two say the same axis the first.
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
                some = tuple(axis for axis in mesh_axes(entry) if sizes[axis] > 1)
                length[factor] = _shared(length.get(factor, size), size)
                entries.setdefault(factor, []).append(some)
                for axis in () if factor in self.undivided or part.whole else some:
                    of_axis = held.setdefault(axis, {})
                    of_axis[factor] = of_axis.get(factor, 0) + math.prod(shape)

        def preferred(axis: str) -> list[str]:
            size = held[axis]
            factors = sorted(size, key=lambda f: (-size[f], f not in self.first))
            if by_type:
                factors.sort(key=lambda f: (told.get(axis) != f, f not in self.first))
            return factors

        chosen: dict[str, set[str]] = {}
        for axis in held:
            for factor in preferred(axis):
                wanted = {axis, *chosen.get(factor, ())}
                if length[factor] % math.prod(sizes[a] for a in wanted) == 0:
                    chosen[factor] = wanted
                    break
        # In the order in which most of them divide an array.
        for entry in entries.values():
            entry.sort(key=len, reverse=True)
        in_order = lambda factor: dict.fromkeys(a for entry in entries[factor] for a in entry)
        return {f: tuple(a for a in in_order(f) if a in axes) for f, axes in chosen.items()}

    def as_told(
        self, shapes: Sequence[tuple[int, ...]], sizes: Mapping[str, int]
    ) -> dict[str, Axes]:
        """The axes that divide each factor, by what is told alone."""
        length: dict[str, int] = {}
        for (_, part), shape in zip(self.operands, shapes, strict=True):
            for factor, size in zip(part.factors, shape, strict=True):
                length[factor] = _shared(length.get(factor, size), size)
        axes: dict[str, Axes] = {}
        used: set[str] = set()
        for factor, wanted in self.told:
            free = [axis for axis in wanted if sizes.get(axis, 1) > 1 and axis not in used]
            while free and length[factor] % math.prod(sizes[axis] for axis in free) != 0:
                free.pop()
            if free:
                axes[factor] = tuple(free)
                used.update(free)
        return axes

    def specs(self, axes: Mapping[str, Axes]) -> tuple[tuple[P, ...], tuple[P, ...]]:
        """The PartitionSpecs of operands and of results, if axes divide the factors so."""
        spec = lambda part: P(*(axes.get(factor) for factor in part.factors))
        operands, results = (
            tuple(spec(part) for _, part in arrays) for arrays in (self.operands, self.results)
        )
        return operands, results

    def mapped(self, names: frozenset[str]) -> Division:
        """That of `jax.vmap` over the first axis of these operands, and of all results."""
        factor = mapped_factor(sum(f.startswith(mapped_factor(0)[0]) for f in self.first))
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

    def summed(
        self, function: Callable, axes: Mapping[str, Axes], psum: Callable = jax.lax.psum
    ) -> Callable:
        """The function of arrays in order, its partial results summed over devices."""

        def run(*operands):
            results = self.in_order(function)(*operands)
            totals = []
            for result, (_, part) in zip(results, self.results, strict=True):
                over = tuple(a for factor in part.sums for a in axes.get(factor, ()))
                totals.append(psum(result, over) if over else result)
            return tuple(totals)

        return run

    def in_order(self, function: Callable) -> Callable:
        """A function of arrays by name as one of arrays in order, as JAX's transforms want it."""

        def run(*operands):
            named = {name: x for (name, _), x in zip(self.operands, operands, strict=True)}
            results = function(**named)
            return tuple(results[name] for name, _ in self.results)

        return run
