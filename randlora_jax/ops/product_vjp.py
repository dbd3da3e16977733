"""`x . (W + dW)` as one function with gradients of its own, on each device's part of the arrays."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from randlora_jax.ops.partitioning import (
    Arrays,
    divided_like,
    over_stack,
    per_device,
    varying_alike,
)
from randlora_jax.ops.passes import pass_of
from randlora_jax.ops.products import Backward, Forward, KernelGradient
from randlora_jax.ops.spec import SHARED, Spec
from randlora_jax.placement import whole


def _forward(spec, operands):
    run = over_stack(pass_of(Forward, spec), spec.division(backward=False), spec.stacked, SHARED)
    return per_device(*run, _sliced(spec, operands), spec.mesh)["y"], operands


def _backward(spec, operands, dy):
    x, kernel = operands["x"], operands.get("kernel")
    both = {**_sliced(spec, operands), "dy": dy.astype(x.dtype)}
    run = over_stack(pass_of(Backward, spec), spec.division(backward=True), spec.stacked, SHARED)
    found = per_device(*run, both, spec.mesh)
    gradients = dict.fromkeys(operands)
    gradients["x"] = divided_like(found["dx"], x)
    for name in ("lam", "gamma") if spec.updated else ():
        gradient, of = found["d_" + name], operands[name]
        gradients[name] = divided_like(gradient.reshape(of.shape), of)
    # Apart from the rest: nobody pays for it who does not ask for it. Codes have none.
    if kernel is not None and spec.grid is None:
        run = over_stack(KernelGradient(spec), spec.kernel_gradient_division, spec.stacked, SHARED)
        found = per_device(*run, both, spec.mesh)
        gradients["kernel"] = divided_like(found["d_kernel"].astype(kernel.dtype), kernel)
    return (gradients,)


def _sliced(spec: Spec, operands: Arrays) -> Arrays:
    """The layer's own part of the bases, A and V, and gamma, in the kernel's own axes."""
    if not spec.updated:
        return operands
    small, large = spec.small_large
    A, B, gamma = (operands[name] for name in ("A", "B", "gamma"))
    (r, n), size = operands["lam"].shape[-2:], math.prod(small)
    return {
        **operands,
        "A": A[:, 0, :size].reshape(r, *small),
        "V": _rows(B[:, :n], large).reshape(*large, n * r),  # column b * r + k
        "gamma": gamma.reshape(*gamma.shape[:-1], *small),
    }


def _rows(B: jax.Array, large: tuple[int, ...]) -> jax.Array:
    """The rows of B that a layer of this large side reads."""
    size = math.prod(large)
    if len(large) > 1 or size < B.shape[0]:  # nothing but all rows has the type of a divided B
        B = whole(B)
    return B[:size]


# x . (W + dW), x . dW or x . W: of x, the kernel, A, B, lam and gamma, as far as it needs them.
_product: Any = jax.custom_vjp(lambda *given: _forward(*given)[0], nondiff_argnums=(0,))
_product.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def product(
    spec: Spec, batch: tuple[int, ...], contract: tuple[int, ...], operands: Any
) -> jax.Array:
    """`_product` of operands as a layer has them, x contracted along any axes.

    Layers that are alike are traced once, and calls that are not traced are compiled.

    Args:
      batch: the axes of x that meet those of a stack of kernels, which are first in all results.
      contract: those that meet the inputs.
    """
    tokens = [i for i in range(operands["x"].ndim) if i not in (*batch, *contract)]
    in_order = lambda x: lax.transpose(x, (*batch, *tokens, *contract))  # nothing to do, mostly
    of_adapters = functools.partial(jnp.stack, axis=len(batch))
    operands = {**operands, "x": in_order(operands["x"])}
    if spec.updated:
        scales, axis = zip(*operands.pop("scales"), strict=True), len(batch) + spec.rows
        operands["lam"], operands["gamma"] = (jnp.stack(each, axis) for each in scales)
    if "keep" in operands:
        operands["keep"] = of_adapters([in_order(keep) for keep in operands["keep"]])
    operands = varying_alike(operands)
    # What is on the next line, a traceback shows: JAX's error says nothing of a way out.
    return _product(spec, operands)  # no jvp, jacfwd, linearize: use merged kernels, as in README
