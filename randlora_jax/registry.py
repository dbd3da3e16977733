"""The layers that can be adapted: which parameter of a class is its kernel, and how it uses it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from randlora_jax import equations, targets
from randlora_jax.config import RandLoraConfig, is_integer
from randlora_jax.sites import Kernel, Shape, Site
from randlora_jax.stored import stack_axes

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
InputAxes = tuple[int, ...] | Callable[[Any, Shape, tuple[Any, ...], dict[str, Any]], Sequence[int]]

Parameters = Mapping[str, tuple[int, ...]]  # raw parameters by path, with their input axes


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """How a class of layers holds and uses its kernel.

    Attributes:
      layer: the class.
      kernel: the name of the parameter.
      input_axes: the kernel's axes that meet the input's; a function tells them for each call.
      layer_axes: a function that tells them for each instance, whatever the call.
      product: the attribute that the layer multiplies with: "dot_general", "einsum_op" or None.
      plain: whether it returns the product, and at most a bias added to it.
      kernel_shape: of one layer, as the instance says it; None if it does not.
    """

    layer: type
    kernel: str = "kernel"
    input_axes: InputAxes | None = None
    layer_axes: Callable[[Any], tuple[int, ...]] | None = None
    product: str | None = None
    plain: bool = False
    kernel_shape: Callable[[Any], Shape] | None = None

    def describe(
        self, layer: Any, value: Any, fan_in_fan_out: bool, call: Arguments | None
    ) -> Kernel | None:
        """An instance's `Kernel`, from the parameter's value and the arguments of a call.

        Args:
          call: its (args, kwargs). None for another method, whose arguments say nothing of how the
            call uses the kernel: then the result is None, if the layer alone does not tell.

        Raises:
          ValueError: for an equation that is no linear map by one kernel.
        """
        shape: Shape = tuple(value.shape)
        axes: Sequence[int] | None
        if self.layer_axes is not None:
            axes = self.layer_axes(layer)
        elif callable(self.input_axes):
            axes = None if call is None else self.input_axes(layer, shape, *call)
        elif self.input_axes is not None:
            axes = self.input_axes
        else:
            equation = equations.equation_of(layer, *(call or ((), {})))
            axes = equations.input_axes(equation, shape) if equation else None
        if axes is None:
            if call is None:
                return None
            axes = (1,) if fan_in_fan_out else (0,)
        return Kernel(shape, tuple(axes), self.kernel, value.dtype)

    def stack_axes(self, layer: Any, shape: Shape) -> tuple[int, ...]:
        """The axes of a stored kernel that stack layers, outermost first, as `nnx.vmap` adds them.

        Raises:
          ValueError: if there is a kernel of another shape, or several ways to read this one.
        """
        if self.kernel_shape is not None:
            return stack_axes(shape, tuple(self.kernel_shape(layer)))
        equation = equations.equation_of(layer, (), {})
        told = self.input_axes is not None or self.layer_axes is not None
        if equation is None and not told and len(shape) > 2:
            raise ValueError(
                f"nothing tells which axes of its kernel of shape {tuple(shape)} are inputs: give "
                "register_layer its input_axes"
            )
        return (0,) * (len(shape) - equations.kernel_ndim(equation)) if equation else ()


_RULES: dict[type, LayerRule] = {}


def register_layer(
    layer: type,
    kernel: str = "kernel",
    input_axes: InputAxes | Sequence[int] | int | None = None,
    *,
    plain: bool = False,
) -> None:
    """Teaches the library a class of layers that has one kernel: `y = einsum(x, kernel)`.

    Subclasses are known with their class. Built in: `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum`,
    and NNX's `Linear`, `LinearGeneral` and `Einsum`.

    Args:
      layer: a Linen or NNX module class.
      kernel: the name of the parameter.
      input_axes: which of its axes meet the input's, 0 or (0, 1); or a function of (layer,
        kernel's shape, args, kwargs) of a call. By default they are read off the einsum equation
        that the call is given, or the layer has as an attribute; without one, the kernel is
        (in, out), or (out, in) under `fan_in_fan_out`.
      plain: promise of a layer with an equation that it returns the product and at most a bias
        added to it: then few tokens cost what they cost a Dense layer. Of other layers the kernel
        is changed, so they can do what they like.

    Raises:
      TypeError: if `layer` is no class, or `kernel` no name.
      ValueError: for `input_axes` that are no axes, counted from 0.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> class Einsum(nn.Module):  # as gemma has it
      ...   shape: tuple
      ...   @nn.compact
      ...   def __call__(self, eqn, x):
      ...     return jnp.einsum(eqn, x, self.param("w", nn.initializers.normal(), self.shape))
      >>> register_layer(Einsum, kernel="w", plain=True)
    """
    if not isinstance(layer, type):
        raise TypeError(f"layer must be a class, got {layer!r}")
    if not isinstance(kernel, str):
        raise TypeError(f"kernel must be the parameter's name, as in kernel='w', got {kernel!r}")
    if input_axes is not None and not callable(input_axes):
        input_axes = _axes("input_axes must", input_axes)
    add_rule(LayerRule(layer, kernel, input_axes, plain=plain))


def add_rule(rule: LayerRule) -> None:
    """Registers a class with all that a rule can say of it."""
    _RULES[rule.layer] = rule


def _axes(subject: str, given: Any) -> tuple[int, ...]:
    """Checks a kernel's input axes; the subject begins the message."""
    axes: tuple[Any, ...] = tuple(given) if isinstance(given, Iterable) else (given,)
    known = bool(axes) and all(is_integer(axis) and axis >= 0 for axis in axes)
    if not known or len(set(axes)) < len(axes):
        raise ValueError(
            f"{subject} be axes of the kernel, counted from 0, each of them once, as in (0,), got "
            f"{given!r}"
        )
    return tuple(int(axis) for axis in axes)


_NO_LINEAR_LAYERS: set[type] = set()


def add_no_linear_layer(cls: type) -> None:
    """Registers a class whose parameters of several axes are no kernels of a linear layer."""
    _NO_LINEAR_LAYERS.add(cls)


def is_no_linear_layer(cls: type) -> bool:
    """Whether the class, or one that it derives from, is known to be none."""
    return any(base in _NO_LINEAR_LAYERS for base in cls.__mro__)


def rule_for(cls: type) -> LayerRule | None:
    """The rule of a class, or of the nearest class that it derives from."""
    return next((_RULES[c] for c in cls.__mro__ if c in _RULES), None)


def raw_kernels(
    module: str, values: Mapping[str, Any], parameters: Parameters
) -> dict[str, Kernel]:
    """Those of a module's own parameters that are asked for by path, by their whole path.

    Raises:
      ValueError: naming the parameter, if it is not of floating point numbers.
    """
    found = {}
    for label, value in values.items():
        path = f"{module}.{label}" if module else label
        for pattern, axes in parameters.items():
            if targets.names_module((pattern,), path):
                inputs = _axes(f"parameters: the axes of {path!r} must", axes)
                if max(inputs) >= len(value.shape) or len(inputs) == len(value.shape):
                    raise ValueError(
                        f"parameters: {path!r} of shape {tuple(value.shape)} can't have the input "
                        f"axes {inputs}: some of its axes are inputs, and the others outputs"
                    )
                try:
                    found[path] = Kernel(tuple(value.shape), inputs, label, value.dtype)
                except ValueError as error:
                    raise ValueError(f"{path!r}: {error}") from None
    return found


def check_has_kernel(
    rule: LayerRule, name: str, own: Iterable[str], config: RandLoraConfig
) -> None:
    """Raises a ValueError for a layer that is named, and holds no parameter of its class's kernel.

    One that "all-linear" means is left out, and told of.
    """
    if rule.kernel not in own and not config.all_linear:
        others = sorted(set(own) - {"bias"})
        cure = (
            f"adapt {others[0]!r} by its path, parameters={{'{name}.{others[0]}': (...)}}, with "
            "those of its axes that are inputs"
            if others
            else "give its name to exclude_modules"
        )
        raise ValueError(
            f"{name!r} has no parameter {rule.kernel!r}, the kernel of its class, but {others}: "
            f"{cure}"
        )


def check_parameters(
    parameters: Parameters, paths: Iterable[str], found: Iterable[str] | None = None
) -> None:
    """Raises a ValueError for a name of a raw parameter that matches none, or none that is adapted.

    Args:
      parameters: as users give them.
      paths: of all parameters.
      found: of those that are adapted, if that can be less.
    """
    names, adapted = list(paths), None if found is None else list(found)
    for pattern in parameters:
        matched = [name for name in names if targets.names_module((pattern,), name)]
        if not matched:
            raise ValueError(
                f"parameters: {pattern!r} matches no parameter; the nearest are "
                f"{targets.nearest(pattern, names)}"
            )
        if adapted is not None and not set(matched) & set(adapted):
            raise ValueError(
                f"parameters: {pattern!r} matches {matched[0]!r}, whose module does not run on "
                "these inputs: give adapt inputs, or a method, that run it"
            )


def check_orientation(sites: Iterable[Site], config: RandLoraConfig) -> None:
    """Warns of a `fan_in_fan_out` that turns no kernel."""
    if config.fan_in_fan_out and all(site.kernel.input_axes != (1,) for site in sites):
        warnings.warn(
            "fan_in_fan_out=True has no effect here: no target stores its kernel (out, in)",
            stacklevel=4,
        )
