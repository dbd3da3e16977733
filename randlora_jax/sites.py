"""Sites: where an update acts, described once for live models, stored trees, and PEFT's files.

A kernel of any shape is a matrix (in, out) to its update. Most are called "kernel" and have their
input axes first; their scales sit beside them as `randlora_lambda` and `randlora_gamma`. Any other
is named with its input axes, and its scales sit one level deeper: "w[1]" is a parameter w whose
axis 1 is the input. "w[0;1]" is a stack of them, along its axis 0, which the input and the result
of the layer have too, as those of experts; each has scales of its own. So a tree of scales says all
that merging and loading need to know.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from randlora_jax import trees
from randlora_jax.bases import num_bases
from randlora_jax.equations import KernelAxes
from randlora_jax.ops.products import accumulation_dtype

SCALES = LAMBDA, GAMMA = ("randlora_lambda", "randlora_gamma")
NUMBER = "randlora_number"  # beside the scales in a stack, where a layer must know which it is
Shape = tuple[int, ...]


def scale_name(scale: str, adapter: str) -> str:
    """How a layer calls a scale of one of several adapters: "randlora_lambda:chat"."""
    return f"{scale}:{adapter}" if adapter else scale


def is_scale(name: str) -> bool:
    """Whether a layer's parameter of this name is ours: of whichever adapter, or `NUMBER`."""
    return name.partition(":")[0] in (*SCALES, NUMBER)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel as its layer sees it, that is, without the axes of a stack of layers.

    Attributes:
      stacked: its axes along which it is a stack itself, of matrices that share the bases.
    """

    shape: Shape
    input_axes: tuple[int, ...] = (0,)
    name: str = "kernel"
    dtype: Any = jnp.float32
    stacked: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(
                f"{self.name!r} is {jnp.dtype(self.dtype)}, which can hold no update: adapt a "
                "kernel of floating point numbers, or codes with their scales, as quantize makes "
                "them, or give the layer's name to exclude_modules"
            )

    @property
    def axes(self) -> KernelAxes:
        """What its axes are to the product."""
        return KernelAxes(self.stacked, self.input_axes)

    @property
    def output_axes(self) -> tuple[int, ...]:
        others = (*self.stacked, *self.input_axes)
        return tuple(i for i in range(len(self.shape)) if i not in others)

    @property
    def order(self) -> tuple[int, ...]:
        """The kernel's axes: those of the stack, of the inputs, of the outputs."""
        return (*self.stacked, *self.input_axes, *self.output_axes)

    @property
    def ordered_shape(self) -> Shape:
        """Its shape in that order."""
        return tuple(self.shape[i] for i in self.order)

    @property
    def stack_sizes(self) -> Shape:
        return tuple(self.shape[i] for i in self.stacked)

    @property
    def features(self) -> tuple[int, int]:
        """(in_features, out_features) of one matrix."""
        size = lambda axes: math.prod(self.shape[i] for i in axes)
        return size(self.input_axes), size(self.output_axes)

    @property
    def gamma_axes(self) -> tuple[int, ...]:
        """The axes of the smaller side, which gamma scales; the inputs', if both are equal."""
        ins, outs = self.features
        return self.input_axes if ins <= outs else self.output_axes

    @property
    def label(self) -> trees.Path:
        """Where the scales sit, seen from the kernel's own module."""
        first = self.input_axes == tuple(range(len(self.input_axes)))
        if self.name == "kernel" and first and not self.stacked:
            return ()
        listed = (",".join(map(str, axes)) for axes in self.axes if axes)
        return (f"{self.name}[{';'.join(listed)}]",)

    def scale_shapes(self, r: int) -> tuple[Shape, Shape]:
        """Shapes of `randlora_lambda` and `randlora_gamma`, those of a stack first."""
        small = min(self.features)
        n = num_bases(small, r)
        return (*self.stack_sizes, r, n), (*self.stack_sizes, n, small)

    def plus(self, value: jax.Array, matrix: jax.Array) -> jax.Array:
        """The kernel plus (in, out) matrices: in float32, and rounded once to its dtype."""
        dtype = accumulation_dtype(value.dtype, matrix.dtype)
        order = self.order
        delta = jnp.transpose(
            matrix.reshape(self.ordered_shape), [*map(order.index, sorted(order))]
        )
        return (value.astype(dtype) + delta.astype(dtype)).astype(value.dtype)


def parse_label(
    path: trees.Path, params: Container[trees.Path] = ()
) -> tuple[trees.Path, KernelAxes | None]:
    """The kernel's path, and its axes if the label says them, from that of its scales.

    Args:
      path: of the scales.
      params: the paths of the base's parameters, where they are known: a module can be called as
        if it were a label, "h[0]".

    Example:
      >>> parse_label(("attn", "q", "w[0,2]"))
      (('attn', 'q', 'w'), KernelAxes(stacked=(), inputs=(0, 2)))
      >>> parse_label(("moe", "w[0;1]")), parse_label(("mlp", "up"))
      ((('moe', 'w'), KernelAxes(stacked=(0,), inputs=(1,))), (('mlp', 'up', 'kernel'), None))
    """
    found = re.fullmatch(r"(.+)\[(?:([\d,]+);)?([\d,]+)\]", path[-1]) if path else None
    if not found or (*path, "kernel") in params:
        return (*path, "kernel"), None
    axes = (tuple(int(i) for i in some.split(",")) if some else () for some in found.groups()[1:])
    return (*path[:-1], found[1]), KernelAxes(*axes)


@dataclasses.dataclass(frozen=True)
class Stack:
    """The axes by which one stored array holds a stack of layers.

    Attributes:
      axes: outermost first; each one counts where those before it are taken away.
      sizes: how many layers the kernel has along each.
      layers: which of them are adapted, of a stack with one axis; None is all. The scales have
        rows for these alone.
    """

    axes: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    layers: tuple[int, ...] | None = None

    @property
    def adapted_sizes(self) -> tuple[int, ...]:
        """The sizes that the scales have along the axes."""
        return self.sizes if self.layers is None else (len(self.layers),)

    def split(self, stored: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What a stored array has for each axis, its size or name: of one layer, of the stack.

        Raises:
          IndexError: if it has no such axis.
        """
        layer, stack = list(stored), []
        for axis in self.axes:
            stack.append(layer.pop(axis))
        return tuple(layer), tuple(stack)

    def join(self, layer: Sequence[Any], stack: Sequence[Any]) -> tuple[Any, ...]:
        """The inverse of `split`."""
        stored = list(layer)
        for axis, entry in reversed(list(zip(self.axes, stack, strict=True))):
            stored.insert(axis if axis >= 0 else len(stored) + 1 + axis, entry)
        return tuple(stored)

    def over(self, function: Callable) -> Callable:
        """A function of one layer's arrays, mapped over the stack."""
        for axis in reversed(self.axes):
            function = jax.vmap(function, axis, axis)
        return function

    def adapted_part(self, stored: jax.Array) -> jax.Array:
        """The part of a stored array whose layers are adapted."""
        return stored if self.layers is None else stored[jnp.array(self.layers)]

    def put(self, stored: jax.Array, part: jax.Array) -> jax.Array:
        """A stored array with other values in its adapted layers."""
        return part if self.layers is None else stored.at[jnp.array(self.layers)].set(part)

    def spread(self, scales: jax.Array) -> jax.Array:
        """Scales with rows of zeros for the layers that are not adapted."""
        if self.layers is None:
            return scales
        return self.put(jnp.zeros((*self.sizes, *scales.shape[1:]), scales.dtype), scales)


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted kernel: the module that holds it, what its layer sees of it, how it is stored."""

    module: trees.Path
    kernel: Kernel
    stack: Stack = Stack()

    @property
    def path(self) -> trees.Path:
        """Where its scales are in "randlora"."""
        return (*self.module, *self.kernel.label)

    @property
    def kernel_path(self) -> trees.Path:
        """Where its kernel is in "params"."""
        return (*self.module, self.kernel.name)

    @property
    def count(self) -> int:
        """How many matrices it stands for: of the adapted layers of its stack, and in each."""
        return math.prod((*self.stack.adapted_sizes, *self.kernel.stack_sizes))

    @property
    def stored_shape(self) -> Shape:
        """The kernel's, in "params"."""
        return self.stack.join(self.kernel.shape, self.stack.sizes)

    def scales(self, tree: trees.Tree) -> tuple[Any, Any]:
        """Its (lambda, gamma) in a tree like "randlora"."""
        node = trees.get(tree, self.path)
        return node[LAMBDA], node[GAMMA]

    def stored_scales(
        self, r: int, slots: tuple[int, ...] = ()
    ) -> dict[trees.Path, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of its scales in "randlora", by path; of those of a table's slots."""
        dtype = accumulation_dtype(self.kernel.dtype)
        shape = lambda layer: self.stack.join((*slots, *layer), self.stack.adapted_sizes)
        return {
            (*self.path, scale): jax.ShapeDtypeStruct(shape(layer), dtype)
            for scale, layer in zip(SCALES, self.kernel.scale_shapes(r), strict=True)
        }

    def scale_axes(
        self,
        names: Sequence[Any],
        followed: Callable[[Any], bool] = lambda name: False,
        slots: tuple[Any, ...] = (),
    ) -> dict[str, tuple[Any, ...]]:
        """What its scales' axes are called, or divided by, where the kernel's are so.

        Args:
          names: of the axes of the stored kernel; or of one layer's alone, if they are no more.
          followed: whether gamma has this name too, where the side of the kernel that it scales
            has it. The axes of a stack have the kernel's in any case.
          slots: what the axis of a table is called, if the scales are those of one.
        """
        layer, stack = names, (None,) * len(self.stack.axes)
        if len(names) > len(self.kernel.shape):
            layer, stack = self.stack.split(names)
        layer = (*layer, *[None] * (len(self.kernel.shape) - len(layer)))
        first, *others = (layer[i] for i in self.kernel.gamma_axes)
        # Several axes are one in gamma, of which only the first, the slowest, can be divided.
        along = None if any(others) or first is None or not followed(first) else first
        own = [layer[i] for i in self.kernel.stacked]
        join = lambda *axes: self.stack.join((*slots, *own, *axes), stack)
        return {LAMBDA: join(None, None), GAMMA: join(None, along)}
