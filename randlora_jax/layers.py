"""The layers that can be adapted: a registry of each class's kernel and its input axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from randlora_jax.kernels import Kernel, Shape, unstack

InputAxes = tuple[int, ...] | Callable[[Any, tuple[int, ...], tuple, dict], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a class of layers holds its kernel."""

    kernel: str
    input_axes: InputAxes | None
    dot_general: bool = False  # the layer computes with its own attribute `dot_general`
    einsum_op: bool = False  # the same for `einsum_op`
    plain: bool = False  # it returns the product, and at most a bias added to it
    shape: Callable[[Any], Shape] | None = None  # of the kernel, as the layer was made

    def stack(self, layer: Any, shape: Shape) -> Shape:
        """The axes of a stored kernel that stack layers, outermost first (NNX's `vmap` adds them).

        Raises:
          ValueError: if there is a kernel of another shape, or several ways to read this one.
        """
        if self.shape is not None:
            return unstack(shape, tuple(self.shape(layer)))
        equation = _equation(layer, (), {})
        if equation is None and self.input_axes is None and len(shape) > 2:
            raise ValueError(
                f"nothing tells which axes of its kernel of shape {tuple(shape)} are inputs: give "
                "register_layer its input_axes"
            )
        return (0,) * (len(shape) - len(_operands(equation)[1])) if equation else ()

    def describe(self, layer: Any, value: Any, args: tuple, kwargs: dict, transposed: bool):
        """The layer's `Kernel`, from the parameter's value and the arguments of a call."""
        axes = self.input_axes
        if axes is None:
            axes = equation_axes(layer, value.shape, args, kwargs)
        elif callable(axes):
            axes = axes(layer, value.shape, args, kwargs)
        if axes is None:
            axes = (1,) if transposed else (0,)
        return Kernel(tuple(value.shape), tuple(axes), self.kernel, value.dtype)


_RULES: dict[type, Rule] = {}


def register_layer(
    layer: type, kernel: str = "kernel", input_axes: InputAxes | None = None, **options: Any
) -> None:
    """Teaches the library a class of layers that has one kernel: `y = einsum(x, kernel)`.

    Subclasses are known with their class. Built in: `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum`,
    and NNX's `Linear`, `LinearGeneral` and `Einsum`.

    Args:
      layer: a Linen or NNX module class.
      kernel: the name of the parameter.
      input_axes: which of its axes meet the input's; or a function of (layer, kernel's shape,
        args, kwargs) of a call. By default they are read off the einsum equation that the call
        is given, or the layer has as an attribute; without one, the kernel is (in, out), or
        (out, in) under `fan_in_fan_out`.
      **options: `plain=True` promises of a layer with an equation that it returns the product and
        at most a bias added to it: then few tokens cost what they cost a Dense layer. Of other
        layers the kernel is changed, so they can do what they like.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp
      >>> class Einsum(nn.Module):  # as gemma has it
      ...   shape: tuple
      ...   @nn.compact
      ...   def __call__(self, eqn, x):
      ...     return jnp.einsum(eqn, x, self.param("w", nn.initializers.normal(), self.shape))
      >>> register_layer(Einsum, kernel="w", plain=True)
    """
    if not isinstance(layer, type):
        raise TypeError(f"layer must be a class, got {layer!r}")
    _RULES[layer] = Rule(kernel, input_axes, **options)


def rule_for(layer: Any) -> Rule | None:
    """The rule of a layer's class, or of the nearest class that it derives from."""
    return next((_RULES[c] for c in type(layer).__mro__ if c in _RULES), None)


def equation_axes(layer, shape, args, kwargs) -> tuple[int, ...] | None:
    """The kernel's input axes in an einsum equation `x, kernel -> y`; None if there is none.

    Raises:
      ValueError: for an equation that shares an axis of the kernel with both x and y.

    Example:
      >>> equation_axes(None, (8, 16, 4), ("BTD,NDH->BTNH",), {})
      (1,)
    """
    equation = _equation(layer, args, kwargs)
    if equation is None:
        return None
    x, kernel, result = _operands(equation)
    linear = all((c in result) != (c in x) for c in kernel)
    if not linear or len(kernel) != len(shape):
        raise ValueError(
            f"the equation {equation!r} is no linear map by one kernel of shape {tuple(shape)}: "
            "give the layer's name to exclude_modules"
        )
    return tuple(i for i, c in enumerate(kernel) if c not in result)


def plain_input(
    cls: type, layer: Any, kernel: Kernel, args: tuple, kwargs: dict
) -> tuple[Any, tuple[int, ...]] | None:
    """The input x of a call that is a plain product, and its axes that meet the kernel's.

    None where the class, itself, was not registered as plain, or the equation is none.
    """
    equation = _equation(layer, args, kwargs)
    arrays = [a for a in (*args, *kwargs.values()) if hasattr(a, "ndim")]
    if cls not in _RULES or not _RULES[cls].plain or equation is None or len(arrays) != 1:
        return None
    (x,) = arrays
    contract = plain_axes(equation, x.ndim, kernel)
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return (x, contract) if is_float and contract is not None else None


def plain_axes(equation: str, ndim: int, kernel: Kernel) -> tuple[int, ...] | None:
    """x's axes that meet the kernel's, if the result is x's other axes and then the kernel's."""
    operands, _, result = equation.replace(" ", "").partition("->")
    left, right = operands.split(",")
    dots = "".join(chr(0x100 + i) for i in range(ndim - len(left.replace("...", ""))))
    left, result = left.replace("...", dots), result.replace("...", dots)
    inputs = [right[i] for i in kernel.input_axes]
    tokens = [c for c in left if c not in inputs]
    if [*result] != [*tokens, *(right[i] for i in kernel.output_axes)]:
        return None
    return tuple(left.index(c) for c in inputs)


_EQUATIONS = ("einsum_str", "einsum_string", "equation", "eqn")


def _equation(layer, args, kwargs) -> str | None:
    given = [*args, *kwargs.values(), *(getattr(layer, n, None) for n in _EQUATIONS)]
    return next((e for e in given if isinstance(e, str) and "," in e), None)


def _operands(equation: str) -> tuple[str, str, str]:
    """The letters of x, of the kernel and of the result."""
    operands, arrow, result = equation.replace(" ", "").replace("...", "").partition("->")
    x, kernel = operands.split(",")
    both = x + kernel
    implied = "".join(sorted(c for c in set(both) if both.count(c) == 1))
    return x, kernel, result if arrow else implied
