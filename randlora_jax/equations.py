"""Einsum equations of layers, `x, kernel -> y`: where they are, and what they say of the axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard


class KernelAxes(NamedTuple):
    """Which of a kernel's axes x and the result have too, a stack of matrices; which only x has."""

    stacked: tuple[int, ...]
    inputs: tuple[int, ...]


_ATTRIBUTES = ("einsum_str", "einsum_string", "equation", "eqn")


def equation_of(layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The equation that a call is given, or that the layer has as an attribute."""
    given = [*args, *kwargs.values(), *(getattr(layer, n, None) for n in _ATTRIBUTES)]
    return next((e for e in given if is_equation(e)), None)


def is_equation(given: Any) -> TypeGuard[str]:
    """Whether it is one, as far as can be seen without the shapes."""
    return isinstance(given, str) and "," in given


def kernel_ndim(equation: str) -> int:
    """How many axes the kernel has.

    Example:
      >>> kernel_ndim("...D, NDH -> ...NH")
      3
    """
    return len(_operands(equation)[1])


def kernel_axes(equation: str, shape: Sequence[int]) -> KernelAxes:
    """What the axes of a kernel of that shape are to the product.

    Raises:
      ValueError: for an equation that is no product of x with one matrix, or with a stack of them.

    Example:
      >>> kernel_axes("BTD,NDH->BTNH", (8, 16, 4))
      KernelAxes(stacked=(), inputs=(1,))
      >>> kernel_axes("ecd,edf->ecf", (4, 8, 16))
      KernelAxes(stacked=(0,), inputs=(1,))
    """
    x, kernel, result = _operands(equation)
    at = lambda in_x, in_result: tuple(
        i for i, c in enumerate(kernel) if (c in x, c in result) == (in_x, in_result)
    )
    stacked, inputs, outputs = at(True, True), at(True, False), at(False, True)
    is_product = inputs and outputs and len(stacked + inputs + outputs) == len(kernel)
    if not is_product or len(kernel) != len(shape):
        raise ValueError(
            f"the equation {equation!r} is no linear map by one kernel of shape {tuple(shape)}: "
            "give the layer's name to exclude_modules"
        )
    return KernelAxes(stacked, inputs)


def equation_for(axes: KernelAxes, ndim: int) -> str:
    """An equation of a product with a kernel of `ndim` axes that are these.

    Example:
      >>> equation_for(KernelAxes((0,), (1,)), 3)
      'tab,abc->tac'
    """
    kernel = "".join(chr(ord("a") + i) for i in range(ndim))
    of_x = "".join(kernel[i] for i in sorted((*axes.stacked, *axes.inputs)))
    result = "".join(c for i, c in enumerate(kernel) if i not in axes.inputs)
    return f"t{of_x},{kernel}->t{result}"


@dataclasses.dataclass(frozen=True)
class Product:
    """An equation as a `dot_general` and a transpose.

    Attributes:
      batch, contract: the axes of x that meet the kernel's stacked ones, and its inputs.
      order: the axes of a `dot_general`'s result (batch..., tokens..., outputs...) in the order
        in which the equation has them.
    """

    batch: tuple[int, ...]
    contract: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def in_order(self) -> bool:
        """Whether x and the result are as a `dot_general` has them: else bits may differ."""
        first = self.batch == tuple(range(len(self.batch)))
        return first and list(self.order) == sorted(self.order)


def product_of(
    equation: str, x_shape: Sequence[int], kernel_shape: Sequence[int], axes: KernelAxes
) -> Product | None:
    """How the equation multiplies an x by a kernel of these shapes, whose axes are known.

    None where it does more than that: sums over tokens, takes a diagonal, or broadcasts.

    Example:
      >>> product_of("BD,DF->FB", (2, 8), (8, 4), KernelAxes((), (0,)))
      Product(batch=(), contract=(1,), order=(1, 0))
    """
    dots = "".join(chr(0x100 + i) for i in range(len(x_shape) - len(_operands(equation)[0])))
    x, kernel, result = _operands(equation.replace("...", dots))
    size = dict(zip(x, x_shape, strict=True))
    stacked, inputs = ([kernel[i] for i in some] for some in axes)
    tokens = [c for c in x if c not in kernel]
    outputs = [c for c in kernel if c not in (*stacked, *inputs)]
    computed = [*stacked, *tokens, *outputs]
    meets = all(size.get(kernel[i]) == kernel_shape[i] for some in axes for i in some)
    if not meets or len(size) < len(x) or sorted(computed) != sorted(result):
        return None
    where = lambda letters: tuple(x.index(c) for c in letters)
    return Product(where(stacked), where(inputs), tuple(computed.index(c) for c in result))


def _operands(equation: str) -> tuple[str, str, str]:
    """The letters of x, of the kernel and of the result."""
    operands, arrow, result = equation.replace(" ", "").replace("...", "").partition("->")
    x, kernel = operands.split(",")
    both = x + kernel
    implied = "".join(sorted(c for c in set(both) if both.count(c) == 1))
    return x, kernel, result if arrow else implied
