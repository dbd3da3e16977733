"""Kernels: which parameter of a layer is one, which of its axes are inputs, where its scales sit.

A kernel of any shape is a matrix (in, out) to the update. Most are called "kernel" and have their
input axes first; their scales sit beside them as `randlora_lambda` and `randlora_gamma`. Any other
is named with its input axes, and its scales sit one level deeper: "w[1]" is a parameter w whose
axis 1 is the input. So a tree of scales says all that merging and loading need to know.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from randlora_jax import trees
from randlora_jax.bases import num_bases

SCALES = ("randlora_lambda", "randlora_gamma")
Shape = tuple[int, ...]


def wide(*dtypes: Any) -> Any:
    """The dtype to accumulate in: the widest of these, and float32 at least."""
    return max((jnp.dtype(d) for d in (*dtypes, jnp.float32)), key=lambda d: d.itemsize)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel as its layer sees it, that is, without the axes of a stack."""

    shape: tuple[int, ...]
    input_axes: tuple[int, ...] = (0,)
    name: str = "kernel"
    dtype: Any = jnp.float32

    @property
    def output_axes(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.shape)) if i not in self.input_axes)

    @property
    def in_features(self) -> int:
        return math.prod(self.shape[i] for i in self.input_axes)

    @property
    def out_features(self) -> int:
        return math.prod(self.shape[i] for i in self.output_axes)

    @property
    def sides(self) -> tuple[int, int]:
        """(in_features, out_features)."""
        return self.in_features, self.out_features

    @property
    def label(self) -> trees.Path:
        """Where the scales sit, seen from the kernel's own module."""
        if self.name == "kernel" and self.input_axes == tuple(range(len(self.input_axes))):
            return ()
        return (f"{self.name}[{','.join(map(str, self.input_axes))}]",)

    def scale_shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of `randlora_lambda` and `randlora_gamma`."""
        small = min(self.sides)
        n = num_bases(small, r)
        return (r, n), (n, small)

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """(in, out) in the kernel's own shape."""
        order = (*self.input_axes, *self.output_axes)
        whole = matrix.reshape([self.shape[i] for i in order])
        return jnp.transpose(whole, [order.index(i) for i in range(len(order))])

    def add(self, value: jax.Array, matrix: jax.Array) -> jax.Array:
        """The kernel plus an (in, out) matrix: in float32, and rounded once to its dtype."""
        dtype = wide(value.dtype, matrix.dtype)
        return (value.astype(dtype) + self.from_matrix(matrix).astype(dtype)).astype(value.dtype)


def parse_label(path: trees.Path) -> tuple[trees.Path, tuple[int, ...] | None]:
    """The kernel's path, and its input axes if the label says them, from that of its scales.

    Example:
      >>> parse_label(("attn", "q", "w[0,2]")), parse_label(("mlp", "up"))
      ((('attn', 'q', 'w'), (0, 2)), (('mlp', 'up', 'kernel'), None))
    """
    found = re.fullmatch(r"(.+)\[([\d,]+)\]", path[-1]) if path else None
    if not found:
        return (*path, "kernel"), None
    return (*path[:-1], found[1]), tuple(int(i) for i in found[2].split(","))


def pairs(scales: trees.Tree) -> Iterator[tuple[trees.Path, tuple[Any, Any]]]:
    """(path, (lambda, gamma)) of each kernel in a tree of scales.

    Raises:
      ValueError: if one of the two is missing.
    """
    leaves = dict(trees.items(scales))
    for path in sorted({path[:-1] for path in leaves}):
        for label in SCALES:
            if (*path, label) not in leaves:
                raise ValueError(f"the scales lack {'.'.join((*path, label))!r}")
        yield path, tuple(leaves[(*path, label)] for label in SCALES)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A stored kernel: the axes that stack layers, outermost first, and the kernel of one layer."""

    stack: tuple[int, ...]
    kernel: Kernel

    def over_stack(self, function: Callable) -> Callable:
        """`function(kernel, lambda, gamma)` of one layer, mapped over all."""
        for axis in reversed(self.stack):
            function = jax.vmap(function, axis, axis)
        return function


def layouts(
    shape: tuple[int, ...],
    lam: tuple[int, ...],
    gamma: tuple[int, ...],
    input_axes: tuple[int, ...] | None = None,
    name: str = "kernel",
) -> list[Layout]:
    """All ways to read a stored kernel that fit its scales' shapes, the likeliest first.

    They differ in (in, out): what reads the same is listed once.

    Raises:
      ValueError: if there is none.
    """
    fits: dict[tuple, Layout] = {}
    for stack in itertools.product((0, 1, -1), repeat=len(lam) - 2):
        if fits:
            break  # stacks are nearly always on axis 0, and the sizes seldom allow another
        core, sizes = zip(*(_unstack(s, stack) for s in (shape, lam, gamma)), strict=True)
        if None in core or len(set(sizes)) != 1:
            continue
        splits = [input_axes] if input_axes else _leading(core[0])
        for axes in splits:
            kernel = Kernel(core[0], axes, name)
            if max(axes) < len(core[0]) and kernel.scale_shapes(core[1][0]) == core[1:]:
                fits.setdefault(kernel.sides, Layout(stack, kernel))
    if not fits:
        raise ValueError(
            f"scales of shapes {lam} and {gamma} don't fit a kernel of {shape}: they are of "
            "another model or another r"
        )
    return list(fits.values())


def only(found: list[Layout], shape: tuple[int, ...]) -> Layout:
    """The one way to read a stored kernel.

    Raises:
      ValueError: if the shapes leave a choice, or none.
    """
    if len(found) != 1:
        raise ValueError(
            f"a kernel of {shape} can be any of {sorted(f.kernel.sides for f in found)} (in, out): "
            "give the model's example inputs too, as in merge(variables, x)"
        )
    return found[0]


def unstack(shape: Shape, core: Shape) -> Shape:
    """The axes that a stored kernel has besides those of one layer's, `core`; outermost first.

    Raises:
      ValueError: if there is no way to read it so.
    """
    for axes in itertools.product((0, 1, -1), repeat=max(len(shape) - len(core), 0)):
        if _unstack(shape, axes)[0] == tuple(core):
            return axes
    raise ValueError(f"its kernel has the shape {tuple(shape)}, but it was made for {tuple(core)}")


def _leading(shape):
    return [tuple(range(i)) for i in range(1, len(shape))]


def _unstack(shape, stack):
    """A shape without its stack's axes, and their sizes; None where there is no such axis."""
    sizes = []
    for axis in stack:
        if not -len(shape) <= axis < len(shape):
            return None, None
        shape = list(shape)
        sizes.append(shape.pop(axis))
    return tuple(shape), tuple(sizes)
