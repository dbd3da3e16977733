"""The layers that can be adapted: which parameter of a class is its kernel, and how it uses it."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from randlora_jax import equations
from randlora_jax.config import RandLoraConfig, is_integer
from randlora_jax.equations import KernelAxes
from randlora_jax.known_layers import KNOWN
from randlora_jax.sites import Kernel, Shape, Site, Stack
from randlora_jax.stored import stack_axes

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# How a kernel is used: its axes that meet the input's; or an equation "x, kernel -> y", which tells
# of stacks too; or a function of (layer, kernel's shape, args, kwargs) of a call that gives those.
# None: the call's own equation says it.
Axes = int | Sequence[int] | str | KernelAxes
Use = Axes | Callable[[Any, Shape, tuple[Any, ...], dict[str, Any]], Axes] | None
# The name of a kernel, or several with their uses; or a function of the layer that gives these.
Kernels = str | Mapping[str, Use] | Callable[[Any], str | Mapping[str, Use]]


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """How a class of layers holds and uses its kernels.

    Attributes:
      layer: the class.
      kernel: the names of its parameters.
      input_axes: how it uses one that is alone.
      product: the attribute that the layer multiplies with: "dot_general", "einsum_op" or None.
      plain: whether it returns the product, and at most a bias added to it; or tells it itself.
      kernel_shape: of one layer, as the instance says it; None if it does not.
    """

    layer: type
    kernel: Kernels = "kernel"
    input_axes: Use = None
    product: str | None = None
    plain: bool | Callable[[Any], bool] = False
    kernel_shape: Callable[[Any], Shape] | None = None

    def is_plain(self, layer: Any) -> bool:
        return self.plain(layer) if callable(self.plain) else self.plain

    def equation(self, layer: Any, kernel: Kernel, call: Arguments) -> str | None:
        """The equation by which a call uses a kernel, if it is one."""
        use, (args, kwargs) = self.kernels_of(layer)[kernel.name], call
        use = use(layer, kernel.shape, args, kwargs) if callable(use) else use
        if use is None:
            return equations.equation_of(layer, args, kwargs)
        return use if equations.is_equation(use) else None

    def kernels_of(self, layer: Any) -> dict[str, Use]:
        """The names of an instance's kernels, and how it uses them."""
        found = self.kernel(layer) if callable(self.kernel) else self.kernel
        return {found: self.input_axes} if isinstance(found, str) else dict(found)

    def describe(
        self, layer: Any, name: str, value: Any, fan_in_fan_out: bool, call: Arguments | None
    ) -> Kernel | None:
        """One of an instance's kernels, from the parameter's value and the arguments of a call.

        Args:
          call: its (args, kwargs). None for another method, whose arguments say nothing of how the
            call uses the kernel: then the result is None, if the layer alone does not tell.

        Raises:
          ValueError: for an equation that is no linear map by one kernel.
        """
        shape: Shape = tuple(value.shape)
        use = self.kernels_of(layer)[name]
        if callable(use):
            use = None if call is None else use(layer, shape, *call)
        elif use is None:
            use = equations.equation_of(layer, *(call or ((), {})))
        if use is None:
            if call is None:
                return None
            use = 1 if fan_in_fan_out else 0
        axes = kernel_axes(f"the input_axes of {name!r} must", use, shape)
        return Kernel(shape, axes.inputs, name, value.dtype, axes.stacked)

    def stack_axes(
        self, layer: Any, name: str, shape: Shape, named: tuple[int, ...] = ()
    ) -> tuple[int, ...]:
        """The axes of a stored kernel that stack layers, outermost first, as `nnx.vmap` adds them.

        Args:
          named: what the kernel's variable says, where it tells of them all.

        Raises:
          ValueError: if there is a kernel of another shape, or several ways to read this one.
        """
        if self.kernel_shape is not None:
            one = tuple(self.kernel_shape(layer))
            fits = len(one) + len(named) == len(shape) and Stack(named).split(shape)[0] == one
            return named if fits else stack_axes(shape, one)
        use = self.kernels_of(layer)[name]
        equation = equations.equation_of(layer, (), {}) if use is None else use
        if equation is None and len(shape) > 2:
            raise ValueError(
                f"nothing tells which axes of its kernel of shape {tuple(shape)} are inputs: give "
                "register_layer its input_axes"
            )
        outer = outer_axes(equation, shape)
        return named if len(named) == len(outer) else outer


_RULES: dict[type, LayerRule] = {}


def register_layer(
    layer: type, kernel: Kernels = "kernel", input_axes: Use = None, *, plain: bool = False
) -> None:
    """Teaches the library a class of layers that has a kernel: `y = einsum(x, kernel)`.

    Subclasses are known with their class. Built in: `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum`,
    NNX's `Linear`, `LinearGeneral` and `Einsum`, and the layers of gemma, MaxText and tunix.

    Args:
      layer: a Linen or NNX module class.
      kernel: the name of the parameter; or a function of the layer that gives it, as in
        `lambda layer: layer.weight_name`. Of a layer that has several, it is, or gives, their names
        with the axes of each, {"gate": "ecd,edf->ecf", "out": "ecf,efd->ecd"}.
      input_axes: which of its axes meet the input's, 0 or (0, 1); or an equation, "x, kernel -> y";
        or a function of (layer, kernel's shape, args, kwargs) of a call that gives one of these.
        By default it is the einsum equation that the call is given, or the layer has as an
        attribute; without one, the kernel is (in, out), or (out, in) under `fan_in_fan_out`.
        Where x, kernel and result of an equation share an axis, as that of experts, the kernel is
        a stack of matrices along it, and each has scales of its own.
      plain: promise of a layer with an equation that it returns the product and at most a bias
        added to it: then few tokens cost what they cost a Dense layer. Of other layers the kernel
        is changed, so they can do what they like.

    Raises:
      TypeError: if `layer` is no class, or `kernel` neither a name, a mapping nor a function.
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
    if not (isinstance(kernel, str | Mapping) or callable(kernel)):
        raise TypeError(f"kernel must be the parameter's name, as in kernel='w', got {kernel!r}")
    if isinstance(kernel, Mapping) and input_axes is not None:
        raise TypeError(f"input_axes={input_axes!r} are of one kernel: give each its own in kernel")
    uses = kernel if isinstance(kernel, Mapping) else {"input_axes": input_axes}
    for name, use in uses.items():
        if not (use is None or equations.is_equation(use) or callable(use)):
            _axes(f"{name} must", use)
    add_rule(LayerRule(layer, kernel, input_axes, plain=plain))


def add_rule(rule: LayerRule) -> None:
    """Registers a class with all that a rule can say of it."""
    _RULES[rule.layer] = rule


def kernel_axes(subject: str, given: Axes, shape: Shape) -> KernelAxes:
    """The axes of a kernel of that shape as they are given, which the subject of messages says.

    Raises:
      ValueError: for what are no axes, or no equation, of such a kernel.
    """
    if equations.is_equation(given):
        return equations.kernel_axes(given, shape)
    return given if isinstance(given, KernelAxes) else KernelAxes((), _axes(subject, given))


def outer_axes(use: Any, shape: Shape) -> tuple[int, ...]:
    """The axes of a stored kernel that an equation does not have: they stack layers."""
    return (0,) * (len(shape) - equations.kernel_ndim(use)) if equations.is_equation(use) else ()


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
    return next((rule for c in cls.__mro__ if (rule := _RULES.get(c) or _known(c))), None)


@functools.cache
def _known(cls: type) -> LayerRule | None:
    fields = KNOWN.get(f"{cls.__module__}.{cls.__qualname__}")
    return LayerRule(cls, **fields) if fields else None


def check_has_kernel(
    kernels: Iterable[str], name: str, own: Iterable[str], config: RandLoraConfig
) -> None:
    """Raises a ValueError for a layer that is named, and holds no parameter of its class's kernels.

    One that "all-linear" means is left out, and told of.
    """
    lacking = [kernel for kernel in kernels if kernel not in own]
    if lacking and not config.all_linear:
        others = sorted(set(own) - {"bias"})
        cure = (
            f"adapt {others[0]!r} by its path, parameters={{'{name}.{others[0]}': (...)}}, with "
            "those of its axes that are inputs"
            if others
            else "give its name to exclude_modules"
        )
        raise ValueError(
            f"{name!r} has no parameter {lacking[0]!r}, the kernel of its class, but {others}: "
            f"{cure}"
        )


def check_orientation(sites: Iterable[Site], config: RandLoraConfig) -> None:
    """Warns of a `fan_in_fan_out` that turns no kernel."""
    if config.fan_in_fan_out and all(site.kernel.input_axes != (1,) for site in sites):
        warnings.warn(
            "fan_in_fan_out=True has no effect here: no target stores its kernel (out, in)",
            stacklevel=4,
        )
