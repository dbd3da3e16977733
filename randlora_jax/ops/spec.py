"""The static part of one product, and how its operands and results are divided among devices.

| operand | shape, in the kernel's own axes | |
|---|---|---|
| kernel | (in..., out...) | absent where the update alone is wanted; codes of a quantised one |
| scale, zero_point | (tiles or 1 for each axis) | of a quantised kernel |
| x | (tokens..., in...) | |
| keep | (a, tokens..., in...) | what dropout keeps of x for each adapter, if there is one |
| dy | (tokens..., out...) | in the backward pass |
| A | (r, small...) | the part of `randlora_A` that the layer reads |
| V | (large..., m) | the same of `randlora_B`, its columns basis-major |
| lam | (rows..., a, r, n) | of a adapters, whose updates are summed |
| gamma | (rows..., a, n, small...) | |

The rows, mostly none, are the first axes of tokens, where each row has scales of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from randlora_jax.ops.costs import Strategy
from randlora_jax.ops.division import Axes, Division, Factors, Part, Told, mapped_factor

Shape = tuple[int, ...]
SHARED = frozenset(("A", "V"))  # by all layers of a stack


@dataclasses.dataclass(frozen=True)
class Grid:
    """The static part of a quantised kernel.

    Attributes:
      levels: what each code stands for, if that is not itself.
      beside: (name, shape) of the arrays beside the codes. Along each axis they have one number for
        each of some tiles of equal size: the kernel's own size, one, or what divides it.
      dtype: of the floats.
    """

    levels: tuple[float, ...] | None
    beside: tuple[tuple[str, Shape], ...]
    dtype: Any

    def parts(self, kernel: Factors, kernel_shape: Shape) -> Iterator[tuple[str, Part]]:
        """How what is beside the codes is divided: by tiles, as the kernel is by its rows."""
        for name, shape in self.beside:
            axes = enumerate(zip(shape, kernel_shape, kernel, strict=True))
            factors = (f if size > 1 or size == of else f"u{i}" for i, (size, of, f) in axes)
            yield name, Part(tuple(factors), group="q")

    @property
    def undivided(self) -> Factors:
        """Names that `parts` gives to axes of one number."""
        return tuple(f"u{i}" for i in range(max((len(s) for _, s in self.beside), default=0)))


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static part of one call. The kernel is (in..., out...), x is (tokens..., in...)."""

    token_axes: int  # how many of x
    input_axes: int  # how many of the kernel
    kernel_shape: tuple[int, ...]
    plus_kernel: bool
    precision: Any
    preferred: Any  # dtype of the result, None for the operands'
    strategy: Strategy
    rates: tuple[float, ...] = ()  # of each adapter's dropout, if there is one
    out_axes: tuple[tuple[str, ...], ...] = ()  # that divide the outputs, of a mesh with types
    told: Told | None = None
    stacked: int = 0  # leading axes that operands and results have, but for A and V
    grid: Grid | None = None  # of a quantised kernel
    updated: bool = True  # else it is x . W alone
    rows: int = 0  # leading axes of tokens along which the scales differ

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The kernel's shape on the side of the inputs and on that of the outputs."""
        return self.kernel_shape[: self.input_axes], self.kernel_shape[self.input_axes :]

    @property
    def inputs_are_small(self) -> bool:
        """Whether U, the factor that trains, is the one that x meets first."""
        ins, outs = self.sides
        return math.prod(ins) <= math.prod(outs)

    @property
    def small_large(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The kernel's shape on its small and on its large side."""
        ins, outs = self.sides
        return (ins, outs) if self.inputs_are_small else (outs, ins)

    def division(self, backward: bool) -> Division:
        """How the arrays of a forward or backward pass are divided among devices."""
        tokens, ins, outs = self._factors
        small, large = (ins, outs) if self.inputs_are_small else (outs, ins)
        rows, summed = tokens[: self.rows], tokens[self.rows :]
        operands = {
            "kernel": Part(ins + outs),
            **(dict(self.grid.parts(ins + outs, self.kernel_shape)) if self.grid else {}),
            "x": Part(tokens + ins),
            "keep": Part(("a", *tokens, *ins), group="k"),
            "dy": Part(tokens + outs),
            "A": Part(("r", *small), group="a", whole=True),
            "V": Part((*large, "m"), group="v", whole=not (self.told and self.told.bases)),
            "lam": Part((*rows, "a", "r", "n")),
            "gamma": Part((*rows, "a", "n", *small), group="s"),
        }
        results = {
            "y": Part(tokens + outs, sums=ins),
            "dx": Part(tokens + ins, sums=outs),
            "d_lam": Part((*rows, "a", "r", "n"), sums=summed + ins + outs),
            "d_gamma": Part((*rows, "a", "n", *small), sums=summed + large, group="s"),
        }
        absent = {"y"} if backward else {"dy", "dx", "d_lam", "d_gamma"}
        absent |= set() if self.plus_kernel else {"kernel"}
        absent |= set() if self.rates else {"keep"}
        absent |= set() if self.updated else {"A", "V", "lam", "gamma", "d_lam", "d_gamma"}
        present = lambda table: tuple((n, part) for n, part in table.items() if n not in absent)
        undivided = ("a", "r", "n", "m") + (self.grid.undivided if self.grid else ())
        return Division(present(operands), present(results), tokens, undivided, self._told)

    @property
    def kernel_gradient_division(self) -> Division:
        tokens, ins, outs = self._factors
        operands = ("x", Part(tokens + ins)), ("dy", Part(tokens + outs))
        return Division(
            operands, (("d_kernel", Part(ins + outs, sums=tokens)),), tokens, (), self._told
        )

    @property
    def mesh(self) -> Mesh | AbstractMesh | None:
        """On which the division is told."""
        return self.told.mesh if self.told else None

    @property
    def _told(self) -> tuple[tuple[str, Axes], ...]:
        tokens, ins, outs = self._factors
        if self.told is None:
            return tuple(zip(outs, self.out_axes, strict=False))
        told, stack = self.told, map(mapped_factor, reversed(range(self.stacked)))
        of_stack = tuple(zip(stack, told.stacked, strict=False))
        of_tokens = tuple(zip(tokens, told.tokens, strict=False))
        taken = {*told.stack, *(axis for _, axes in of_stack for axis in axes)}
        if taken:  # tokens are dispatched to what is stacked: nothing tells which axis is which
            every = tuple(axis for axes in told.tokens for axis in axes if axis not in taken)
            of_tokens = tuple((factor, every) for factor in tokens)
        return *of_stack, *of_tokens, *zip(ins + outs, told.kernel, strict=False)

    @property
    def _factors(self) -> tuple[Factors, Factors, Factors]:
        """Names of the axes of tokens, inputs and outputs, as `Division` wants them."""
        named = lambda name, count: tuple(f"{name}{axis}" for axis in range(count))
        ins, outs = self.sides
        return named("t", self.token_axes), named("i", len(ins)), named("o", len(outs))
