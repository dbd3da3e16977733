"""How one layer runs with its updates: the one policy behind the Linen and the NNX front end.

Whatever method of whatever module runs, it computes what it would compute on `W + dW`, so that
applying and merging agree. A layer that is known to multiply by its kernel, and to do nothing else
with it, gets a cheaper way to the same numbers:

1. its own product, `dot_general` or `einsum_op`, is replaced by ours;
2. it runs on W, and x . dW is added to the result, where it is registered as plain;
3. else it runs on a changed kernel, W + dW, and can do with it what it likes.

Where W is quantised, the first two have its codes in the product, and the layer runs on zeros; in
the third it runs on floats that are made for this call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from randlora_jax import equations
from randlora_jax.bases import Bases
from randlora_jax.layer_call import Call, Change, as_floats
from randlora_jax.ops.costs import Strategy
from randlora_jax.ops.division import Told
from randlora_jax.ops.dot_general import (
    RandLoraDotGeneral,
    delta_weight,
)
from randlora_jax.prepared import Update
from randlora_jax.quantised import floats, is_quantised
from randlora_jax.registry import LayerRule, rule_for
from randlora_jax.sites import Kernel


def run(
    call: Call,
    updates: Sequence[Update],
    bases: Bases,
    strategy: Strategy,
    told: Told | None = None,
) -> Any:
    """The call's result, computed with the updates.

    Args:
      updates: none, where only a quantised kernel is special.
      told: how the arrays of the first one's kernel are divided, its axes as its layer has them.
    """
    rule, kernels = rule_for(call.cls), {u.kernel: None for u in updates}
    if not kernels and rule is not None:
        kernels = _quantised_kernels(call, rule)
    if rule is not None and len(kernels) == 1 and _is_its_product(call, rule, *kernels):
        (kernel,) = kernels
        _check_equation(call, rule, kernel)
        told = _told_in_order(told, kernel) if told else None
        operation = RandLoraDotGeneral(
            bases,
            [u.scales for u in updates],
            [u.dropout for u in updates],
            *(strategy, told, None, _in_order(call.quantised.get(kernel.name), kernel)),
            updates[0].target or "(root)" if updates else "",
        )
        rows = any(u.rows for u in updates)
        computed = _through_product(call, rule, operation, kernel, rows)
        if computed is None:
            computed = _with_product_added(call, rule, operation, kernel)
        if computed is not None:
            return computed.value
    for update in updates:
        if update.rows:
            raise ValueError(
                f"{update.target or '(root)'!r} is not known to multiply by its kernel and do "
                f"nothing else, so adapter_ids of shape {update.rows} would need a kernel for each "
                "row: give one id for all, or leave the layer out of the adapters"
            )
    return _on_changed_kernels(call, updates, bases) if updates else call.run_on_floats()


def _quantised_kernels(call: Call, rule: LayerRule) -> dict[Kernel, None]:
    """The kernel of a layer without updates, if that is its only quantised parameter."""
    names = [*rule.kernels_of(call.layer)]
    if len(names) != 1 or names != [*call.quantised]:
        return {}
    ((name, value),) = call.quantised.items()
    try:
        kernel = rule.describe(call.layer, name, value, False, (call.args, call.kwargs))
    except ValueError:  # it is used by no equation that we know
        return {}
    return {} if kernel is None else {kernel: None}


def _in_order(codes: Any, kernel: Kernel) -> Any:
    """Codes in the order in which a product has a kernel's axes."""
    return None if codes is None else codes.transpose(kernel.order)


def _is_its_product(call: Call, rule: LayerRule, kernel: Kernel) -> bool:
    """Whether the call is one of a layer with this one kernel."""
    return call.method == "__call__" and [*rule.kernels_of(call.layer)] == [kernel.name]


def _told_in_order(told: Told, kernel: Kernel) -> Told:
    """What is told of a kernel, in the order in which a product has its axes."""
    axes = dict(enumerate(told.kernel[-len(kernel.shape) :]))  # less those of an unknown stack
    of = lambda some: tuple(axes.get(i, ()) for i in some)
    matrix = (*kernel.input_axes, *kernel.output_axes)
    return dataclasses.replace(told, kernel=of(matrix), stacked=of(kernel.stacked))


def _check_equation(call: Call, rule: LayerRule, kernel: Kernel) -> None:
    """Raises a ValueError for a call with another equation than the scales were made for."""
    if rule.kernels_of(call.layer)[kernel.name] is not None:
        return
    equation = equations.equation_of(call.layer, call.args, call.kwargs)
    axes = equations.kernel_axes(equation, kernel.shape) if equation else kernel.axes
    if axes != kernel.axes:
        raise ValueError(
            f"the call's equation has the kernel's axes {axes.inputs} as inputs and "
            f"{axes.stacked} as a stack, but the scales were made for {kernel.input_axes} and "
            f"{kernel.stacked}: register_layer's input_axes says which"
        )


@dataclasses.dataclass(frozen=True)
class _Computed:
    """A result, which may be None itself."""

    value: Any


def _through_product(
    call: Call,
    rule: LayerRule,
    operation: RandLoraDotGeneral,
    kernel: Kernel,
    rows: bool,
) -> _Computed | None:
    """Runs a layer that multiplies through an attribute with ours in its place, if it uses it."""
    # A call that overrides the registered one can use the kernel in other ways too. Only dropout,
    # which needs the layer's input and is off in what `merge` agrees with, may rely on it, and
    # rows of adapters, which have no kernel in common.
    inherits = getattr(call.cls, call.method) is getattr(rule.layer, call.method)
    if not inherits and not any(operation.dropouts) and not rows:
        return None
    used = []

    def dot_general(*args, **kwargs):
        used.append(True)
        return operation(*args, **kwargs)

    def einsum_op(equation, x, value, **options):
        found = equations.product_of(equation, x.shape, kernel.shape, kernel.axes)
        if found is None or not found.in_order:
            whole = floats(call.quantised.get(kernel.name, value)).astype(value.dtype)
            return jnp.einsum(equation, x, whole, **options)
        stacked, inputs = len(found.batch), len(found.contract)
        ours = tuple(range(stacked, stacked + inputs)), tuple(range(stacked))
        dims = ((found.contract, ours[0]), (found.batch, ours[1]))
        return dot_general(x, jnp.transpose(value, kernel.order), dims, **options)

    layer = call.layer
    attributes: dict[str, Any]
    if rule.product == "dot_general" and hasattr(layer, "dot_general"):
        make = getattr(layer, "dot_general_cls", None)
        own = layer.dot_general if make is None else make()
        if own is not None and own is not lax.dot_general:
            operation = dataclasses.replace(operation, dot_general=own)
        attributes = {"dot_general": dot_general}
        if hasattr(layer, "dot_general_cls"):
            attributes["dot_general_cls"] = None
    elif rule.product == "einsum_op" and getattr(layer, "einsum_op", None) is jnp.einsum:
        attributes = {"einsum_op": einsum_op}
    else:
        return None
    y = call.run(_without(kernel) if call.quantised else None, attributes=attributes)
    return _Computed(y) if used else None


def _without(kernel: Kernel) -> Change:
    """Zeros for a kernel of codes, which no layer could take that promotes types."""

    def change(name, value):
        of_kernel = name == kernel.name and is_quantised(value)
        return jnp.zeros(value.shape, value.dtype) if of_kernel else as_floats(name, value)

    return change


def _with_product_added(
    call: Call, rule: LayerRule, operation: RandLoraDotGeneral, kernel: Kernel
) -> _Computed | None:
    """Runs a plain layer and adds x . dW, where that is cheaper; of codes, the whole product."""
    equation = rule.equation(call.layer, kernel, (call.args, call.kwargs))
    arrays = [a for a in (*call.args, *call.kwargs.values()) if hasattr(a, "ndim")]
    plain = call.cls is rule.layer and rule.is_plain(call.layer)
    if not plain or equation is None or len(arrays) != 1:
        return None
    (x,) = arrays
    if operation.kernel is not None and not any(a is x for a in call.args):
        return None
    found = equations.product_of(equation, x.shape, kernel.shape, kernel.axes)
    if found is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    product = x, found.batch, found.contract, kernel.ordered_shape
    if operation.kernel is not None:
        args = _for_one_token(call.args, x, (*found.batch, *found.contract))
        rest = call.run(_without(kernel), args=args)  # its bias
        zeros, batch = jnp.zeros(kernel.ordered_shape, rest.dtype), tuple(range(len(found.batch)))
        inputs = tuple(range(len(batch), len(batch) + len(found.contract)))
        dims = (found.contract, inputs), (found.batch, batch)
        precision = getattr(call.layer, "precision", None)
        y = operation(x.astype(rest.dtype), zeros, dims, precision)
        return _Computed(jnp.transpose(y, found.order) + rest)
    if not operation.is_better_beside(*product):
        return None
    y, update = call.run_on_floats(), operation.update(*product)
    return _Computed(y + jnp.transpose(update, found.order).astype(y.dtype))


def _for_one_token(args: tuple[Any, ...], x: Any, others: Sequence[int]) -> tuple[Any, ...]:
    """Arguments with zeros for x, of size one along all axes but these."""
    few = jnp.zeros([n if i in others else 1 for i, n in enumerate(x.shape)], x.dtype)
    return tuple(few if a is x else a for a in args)


def _on_changed_kernels(call: Call, updates: Sequence[Update], bases: Bases) -> Any:
    """Runs a module on kernels with the updates in them, where it can't be told of a product."""
    A, B = bases["randlora_A"], bases["randlora_B"]
    deltas = [delta_weight(A, B, *u.scales, *u.kernel.features, 1.0) for u in updates]
    dropped, rule = [u for u in updates if u.dropout], rule_for(call.cls)
    # What has several kernels is no linear layer, and has no one input.
    registered = rule is not None and len(rule.kernels_of(call.layer)) == 1
    if not dropped or (registered and call.method != "__call__"):  # only a call has the input
        sums: dict[Kernel, jax.Array] = {}
        for update, delta in zip(updates, deltas, strict=True):
            kernel = update.kernel
            sums[kernel] = sums[kernel] + delta if kernel in sums else delta

        def add(name, value):
            value = as_floats(name, value)
            for kernel, delta in sums.items():
                value = kernel.plus(value, delta) if kernel.name == name else value
            return value

        return call.run(add)
    if not registered:
        raise ValueError(
            f"randlora_dropout={dropped[0].config.randlora_dropout} has no input to act on at the "
            f"raw parameter {dropped[0].target!r}: set it to 0, or deterministic=True"
        )
    # A linear layer on W + dW is one on W and one on dW, each with an input of its own.
    y = call.run_on_floats()
    for update, delta in zip(updates, deltas, strict=True):
        drop = update.dropout or (lambda x: x)
        args = tuple(drop(x) if hasattr(x, "ndim") else x for x in call.args)
        kernel = update.kernel

        def only(name, value, kernel=kernel, delta=delta):
            zeros = jnp.zeros(value.shape, value.dtype)
            return kernel.plus(zeros, delta) if name == kernel.name else zeros

        y = y + call.run(only, args=args, beside=True)
    return y
