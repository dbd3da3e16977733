"""How an NNX layer with scales computes with `W + dW`: on a view of itself that has been changed.

A layer with an attribute for its product gets an adapted one there; any other runs on the kernel
with the update added.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from randlora_jax.bases import Bases
from randlora_jax.config import RandLoraConfig
from randlora_jax.dot_general import (
    RandLoraDotGeneral,
    Scales,
    Strategy,
    check_shapes,
    delta_weight,
    prepare_scales,
)
from randlora_jax.kernels import SCALES, Kernel
from randlora_jax.layers import (
    equation_axes,
    plain_axes,
    plain_input,
    register_layer,
    rule_for,
)


class RandLoraParam(nnx.LoRAParam):
    """Scales: what trains."""


class RandLoraBasis(nnx.Variable):
    """Bases, and which layers of a stack have an update: saved with the model, never trained."""


def _linear_general_axes(layer, shape, args, kwargs):
    del shape, args, kwargs
    if layer.batch_axis:
        raise ValueError(
            f"a LinearGeneral with batch_axis={dict(layer.batch_axis)} is no map by one kernel: "
            "give its name to exclude_modules"
        )
    return tuple(range(len(layer.in_features)))


register_layer(
    nnx.Linear,
    input_axes=(0,),
    dot_general=True,
    shape=lambda layer: (layer.in_features, layer.out_features),
)
register_layer(
    nnx.LinearGeneral,
    input_axes=_linear_general_axes,
    dot_general=True,
    shape=lambda x: (*x.batch_axis.values(), *x.in_features, *x.out_features),
)
register_layer(nnx.Einsum, einsum_op=True, shape=lambda layer: layer.kernel_shape)


BASES = ("randlora_A", "randlora_B", "randlora_scale")


class ClosedOver:
    """Bases in a graph's definition, for stacks: equal if they are the same arrays.

    NNX slices what is in a stack's state along its leading axis, which bases don't have. What is
    closed over, however, no cache of `nnx.jit` or `nnx.remat` knows of: in the definition they see
    it.
    """

    def __init__(self, arrays: Bases):
        self.arrays = arrays

    def __eq__(self, other):
        return isinstance(other, ClosedOver) and all(
            self.arrays.get(key) is other.arrays.get(key) for key in BASES
        )

    def __hash__(self):
        return hash(tuple(id(self.arrays.get(key)) for key in BASES))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of an adapted module.

    Attributes:
      kernels: those that have scales, as one layer sees them.
      adapters: the active ones: the suffix of their scales' names, and their configs.
    """

    kernels: tuple[Kernel, ...]
    adapters: tuple[tuple[str, RandLoraConfig], ...]
    strategy: Strategy


def scales_of(module: nnx.Module) -> dict[tuple[Kernel, str], tuple[RandLoraParam, RandLoraParam]]:
    """An adapted module's scales by kernel and by the suffix of their names."""
    found = {}
    for kernel in module.randlora_plan.kernels:
        holder = getattr(module, kernel.label[0]) if kernel.label else module
        for key in vars(holder):
            if key.startswith(SCALES[0]):
                suffix = key.removeprefix(SCALES[0])
                found[kernel, suffix] = tuple(getattr(holder, s + suffix) for s in SCALES)
    return found


Update = tuple[Kernel, RandLoraConfig, Scales]


def call(module, method, name: str, args, kwargs):
    """Calls an adapted module's own method, of the name, with the active updates."""
    plan: Plan = module.randlora_plan
    scales = scales_of(module)
    active = [
        (kernel, config, suffix)
        for kernel in plan.kernels
        for suffix, config in plan.adapters
        if (kernel, suffix) in scales
    ]
    if not active:
        return method(module, *args, **kwargs)
    bases = _lent(module)
    updates = []
    for kernel, config, suffix in active:
        lam, gamma = (s.get_value() for s in scales[kernel, suffix])
        check_shapes(bases, (lam.shape, gamma.shape), *kernel.sides)
        rows = getattr(module, "randlora_rows" + suffix, None)
        if rows is not None:
            lam = lam * rows.get_value().astype(lam.dtype)
        updates.append((kernel, config, prepare_scales(bases, (lam, gamma), config.scaling)))
    rule = rule_for(module)
    if name == "__call__" and rule is not None and {k.name for k in plan.kernels} == {rule.kernel}:
        kernel = plan.kernels[0]
        if rule.input_axes is None:
            axes = equation_axes(module, kernel.shape, args, kwargs)
            if axes not in (None, kernel.input_axes):
                raise ValueError(
                    f"the call's equation has the kernel's axes {axes} as inputs, but the scales "
                    f"were made for {kernel.input_axes}: register_layer's input_axes says which"
                )
        door = _door(module, rule, kernel, bases, updates, plan.strategy)
        if door is not None:
            used, changes = door
            y = _on_view(module, method, changes, args, kwargs)
            if used:
                return y
        y = _beside(module, method, kernel, bases, updates, plan.strategy, args, kwargs)
        if y is not None:
            return y
    return _through_kernels(module, method, rule, bases, updates, args, kwargs)


def _beside(module, method, kernel, bases, updates: list[Update], strategy, args, kwargs):
    """Runs a layer on its own kernel and adds x . dW, where that is cheaper; else None."""
    plain = plain_input(type(module).randlora_class, module, kernel, args, kwargs)
    if plain is None:
        return None
    dropouts = [_dropout(module, config) for _, config, _ in updates]
    scales = [scales for _, _, scales in updates]
    operation = RandLoraDotGeneral(bases, scales, dropouts, strategy)
    if not operation.is_better_beside(*plain, kernel):
        return None
    y = method(module, *args, **kwargs)
    return y + operation.update(*plain, kernel).astype(y.dtype)


def _lent(module) -> Bases:
    lent = getattr(module, "randlora_bases", None)
    if lent is None:
        raise RuntimeError(
            f"an adapted {type(module).randlora_class.__name__} was called outside of its model, "
            "which holds its bases: call the model or a method of it, or do this within "
            "`with randlora_jax.nnx.lend_bases(model):`"
        )
    if isinstance(lent, ClosedOver):
        return lent.arrays
    return {key: variable.get_value() for key, variable in lent.items()}


def _door(module, rule, kernel, bases, updates: list[Update], strategy):
    """(list that is filled at its use, attributes) with which a layer computes the update too."""
    own = getattr(module, "dot_general", None)
    if getattr(module, "dot_general_cls", None) is not None:
        own = module.dot_general_cls()
    operation = RandLoraDotGeneral(
        bases,
        [scales for _, _, scales in updates],
        [_dropout(module, config) for _, config, _ in updates],
        strategy,
        None if own is jax.lax.dot_general else own,
    )
    used: list[bool] = []

    def dot_general(*args, **kwargs):
        used.append(True)
        return operation(*args, **kwargs)

    def einsum_op(equation, x, value, **options):
        contract = plain_axes(equation, x.ndim, kernel)
        if contract is None:
            return jnp.einsum(equation, x, value, **options)
        value = jnp.transpose(value, (*kernel.input_axes, *kernel.output_axes))
        dims = ((contract, tuple(range(len(contract)))), ((), ()))
        return dot_general(x, value, dims, **options)

    if rule.dot_general and hasattr(module, "dot_general"):
        return used, {"dot_general": dot_general, "dot_general_cls": None}
    if rule.einsum_op and getattr(module, "einsum_op", None) is jnp.einsum:
        return used, {"einsum_op": einsum_op}
    return None


def _on_view(module, method, changes: dict[str, Any], args, kwargs):
    """Calls the method on a view: the module as its own class made it, but for the changes."""
    view = object.__new__(type(module).__mro__[1])
    vars(view).update(vars(module), **changes)
    y = method(view, *args, **kwargs)
    # What the method has stored, as `sow` and caches do, belongs to the module.
    vars(module).update({k: v for k, v in vars(view).items() if k not in changes})
    return y


def _through_kernels(module, method, rule, bases, updates: list[Update], args, kwargs):
    """Runs a module on kernels with the updates added, where it can't be told of a product."""
    dropouts = [_dropout(module, config) for _, config, _ in updates]
    A, B = bases["randlora_A"], bases["randlora_B"]
    deltas = [(k, delta_weight(A, B, *scales, *k.sides, 1.0)) for k, _, scales in updates]
    if not any(dropouts):
        values = {kernel.name: getattr(module, kernel.name).get_value() for kernel, _ in deltas}
        for kernel, delta in deltas:
            values[kernel.name] = kernel.add(values[kernel.name], delta)
        changes = {key: getattr(module, key).replace(value) for key, value in values.items()}
        return _on_view(module, method, changes, args, kwargs)
    if rule is None:
        raise ValueError(
            f"randlora_dropout={updates[0][1].randlora_dropout} has no input to act on at the raw "
            f"parameter {updates[0][0].name!r}: set it to 0, or deterministic=True"
        )
    y = method(module, *args, **kwargs)
    zeros = {
        key: value.replace(jnp.zeros_like(value.get_value()))
        for key, value in vars(module).items()
        if isinstance(value, nnx.Param) and not isinstance(value, RandLoraParam)
    }
    for (kernel, delta), dropout in zip(deltas, dropouts, strict=True):
        drop = lambda x, dropout=dropout: dropout(x) if dropout and hasattr(x, "ndim") else x
        zero = zeros[kernel.name]
        only = {**zeros, kernel.name: zero.replace(kernel.add(zero.get_value(), delta))}
        y = y + _on_view(module, method, only, tuple(map(drop, args)), kwargs)
    return y


def _dropout(module, config: RandLoraConfig):
    if config.randlora_dropout == 0 or module.deterministic:
        return None
    layer = nnx.Dropout(config.randlora_dropout, deterministic=False)
    return functools.partial(layer, rngs=module.randlora_rngs)
