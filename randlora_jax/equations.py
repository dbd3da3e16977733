"""Einsum equations of layers, `x, kernel -> y`: where they are, and what they say of the axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_ATTRIBUTES = ("einsum_str", "einsum_string", "equation", "eqn")


def equation_of(layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The equation that a call is given, or that the layer has as an attribute."""
    given = [*args, *kwargs.values(), *(getattr(layer, n, None) for n in _ATTRIBUTES)]
    return next((e for e in given if isinstance(e, str) and "," in e), None)


def kernel_ndim(equation: str) -> int:
    """How many axes the kernel has.

    Example:
      >>> kernel_ndim("...D, NDH -> ...NH")
      3
    """
    return len(_operands(equation)[1])


def input_axes(equation: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The axes of a kernel of that shape that meet the input's.

    Raises:
      ValueError: for an equation that shares an axis of the kernel with both x and y.

    Example:
      >>> input_axes("BTD,NDH->BTNH", (8, 16, 4))
      (1,)
    """
    x, kernel, result = _operands(equation)
    linear = all((c in result) != (c in x) for c in kernel)
    if not linear or len(kernel) != len(shape):
        raise ValueError(
            f"the equation {equation!r} is no linear map by one kernel of shape {tuple(shape)}: "
            "give the layer's name to exclude_modules"
        )
    return tuple(i for i, c in enumerate(kernel) if c not in result)


def contracted_axes(
    equation: str, ndim: int, kernel_inputs: Sequence[int]
) -> tuple[int, ...] | None:
    """The axes of an x of `ndim` axes that meet the kernel's, in the order of `kernel_inputs`.

    None where the result is not x's other axes and then the kernel's, in their order: where it is
    no `dot_general`.

    Example:
      >>> contracted_axes("...D,NDH->...NH", 3, (1,)), contracted_axes("BD,DF->FB", 2, (0,))
      ((2,), None)
    """
    dots = "".join(chr(0x100 + i) for i in range(ndim - len(_operands(equation)[0])))
    x, kernel, result = _operands(equation.replace("...", dots))
    inputs = [kernel[i] for i in kernel_inputs]
    tokens = [c for c in x if c not in inputs]
    outputs = [c for i, c in enumerate(kernel) if i not in kernel_inputs]
    return tuple(x.index(c) for c in inputs) if [*result] == tokens + outputs else None


def _operands(equation: str) -> tuple[str, str, str]:
    """The letters of x, of the kernel and of the result."""
    operands, arrow, result = equation.replace(" ", "").replace("...", "").partition("->")
    x, kernel = operands.split(",")
    both = x + kernel
    implied = "".join(sorted(c for c in set(both) if both.count(c) == 1))
    return x, kernel, result if arrow else implied
