"""The products of `x . (W + dW)` and of its gradients: one device's share.

The update is dW = L @ R with L (in, m) and R (m, out), one of which is U = lambda * A * gamma and
the other V, B flattened; m = r * n. `spec` says what the operands are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from randlora_jax.ops.costs import cheapest
from randlora_jax.ops.partitioning import Arrays
from randlora_jax.ops.spec import Spec

Shape = tuple[int, ...]
Axes = Sequence[int]


def accumulation_dtype(*dtypes: Any) -> Any:
    """The dtype to accumulate in: the widest of these, and float32 at least."""
    return max((jnp.dtype(d) for d in (*dtypes, jnp.float32)), key=lambda d: d.itemsize)


@jax.custom_jvp
def computed_after(value, other):
    """The same value to the last bit, but not before `other` is there.

    What is made of the scales alone, XLA would make for all layers before the first of them runs,
    or keep from the forward to the backward pass: an array of a kernel's size for every layer. An
    optimization barrier does not help, since XLA takes it away before it decides on an order.
    """
    return _computed_after(value, other)


computed_after.defjvp(lambda primals, tangents: (computed_after(*primals), tangents[0]))


@custom_vmap
def _computed_after(value, other):
    if other.size == 0:
        return value
    # Nothing is greater than infinity, not even what is no number; but XLA does not know that.
    return value + (other[(0,) * other.ndim] > jnp.inf).astype(value.dtype)


@_computed_after.def_vmap
def _(size, batched, value, other):
    # One number of all examples will do, so that a value which they share stays one. Where devices
    # have different ones, as types say, they would exchange it: memory may be the cheaper.
    del size
    if batched[1] and any(jax.typeof(other).sharding.spec[:1]):
        return value, batched[0]
    return _computed_after(value, other), batched[0]


def factors(
    A: Array, V: Array, lam: Array, gamma: Array, inputs_are_small: bool, dtype: Any
) -> tuple[Array, Array]:
    """L (in, m) and R (m, out), of which dW = L @ R: U and V, transposed for in <= out.

    From A (r, small), V (large, m), and the lambda (a, r, n) and gamma (a, n, small) of a adapters,
    whose updates are summed.
    """
    outers = (lam[i][:, :, None] * gamma[i][None] for i in range(lam.shape[0]))
    outer = functools.reduce(jnp.add, outers)  # (r, n, small)
    U = (outer * A[:, None].astype(outer.dtype)).reshape(-1, A.shape[-1])  # row k * n + b
    U, V = U.astype(dtype), V.astype(dtype)
    return (U.T, V.T) if inputs_are_small else (V, U)


def _scale_gradients(A, lam, gamma, dU):
    """Gradients of lambda and gamma from that of U, (m, small)."""
    (_, r, n), small = lam.shape, A.shape[-1]
    weighted = (dU.reshape(r, n, small) * A[:, None].astype(dU.dtype))[None]
    d_lam = jnp.sum(weighted * gamma.astype(dU.dtype)[:, None], -1)
    d_gamma = jnp.sum(weighted * lam.astype(dU.dtype)[..., None], 1)
    return d_lam.astype(lam.dtype), d_gamma.astype(gamma.dtype)


@dataclasses.dataclass(frozen=True)
class Pass:
    """One device's share of a pass: a function of operands by name."""

    spec: Spec

    def dot(self, a: Array, b: Array, a_axes: Axes, b_axes: Axes, dtype: Any) -> Array:
        """Their product, contracted along these axes, in the call's precision."""
        dims = ((tuple(a_axes), tuple(b_axes)), ((), ()))
        return lax.dot_general(a, b, dims, self.spec.precision, dtype)

    def factors(
        self, x: Array, latest: Array, A: Array, V: Array, lam: Array, gamma: Array
    ) -> tuple[Array, Array, Shape, Shape, tuple[bool, bool]]:
        """L (in, m), R (m, out), the shapes in and out have here, and the ways to compute.

        They are not computed before `latest`, x or dy.
        """
        spec = self.spec
        small, large = A.shape[1:], V.shape[:-1]
        left, right = factors(
            A.reshape(A.shape[0], -1),
            V.reshape(-1, V.shape[-1]),
            computed_after(lam, latest),
            gamma.reshape(*gamma.shape[:2], -1),
            spec.inputs_are_small,
            x.dtype,
        )
        ins, outs = (small, large) if spec.inputs_are_small else (large, small)
        sizes = math.prod(x.shape[: spec.token_axes]), left.shape[0], right.shape[1]
        ways = cheapest(*sizes, left.shape[1], spec.strategy, spec.plus_kernel)
        return left, right, ins, outs, ways

    def merged(self, kernel: Array | None, left: Array, right: Array, shape: Shape) -> Array:
        """W + L.R, accumulated in float32 and rounded once to the kernel's dtype."""
        dtype = accumulation_dtype(left.dtype)
        delta = self.dot(left, right, (1,), (0,), dtype).reshape(shape)
        if kernel is None:
            return delta.astype(left.dtype)
        return (kernel.astype(dtype) + delta).astype(kernel.dtype)


class Forward(Pass):
    """Gives y."""

    def __call__(
        self, x: Array, A: Array, V: Array, lam: Array, gamma: Array, kernel: Array | None = None
    ) -> Arrays:
        """The result, of operands by name."""
        spec = self.spec
        left, right, ins, outs, (merge, _) = self.factors(x, x, A, V, lam, gamma)
        inputs = range(spec.token_axes, x.ndim), range(len(ins))
        if merge:
            merged = self.merged(kernel, left, right, (*ins, *outs))
            return {"y": self.dot(x, merged, *inputs, spec.preferred)}
        thin = self.dot(x, left.reshape(*ins, -1), *inputs, x.dtype)  # (tokens..., m)
        y = self.dot(thin, right.reshape(-1, *outs), (thin.ndim - 1,), (0,), spec.preferred)
        if kernel is not None:
            y = self.dot(x, kernel, *inputs, spec.preferred) + y
        return {"y": y}


class Backward(Pass):
    """Gives the gradients of x, lambda and gamma."""

    def __call__(
        self,
        x: Array,
        dy: Array,
        A: Array,
        V: Array,
        lam: Array,
        gamma: Array,
        kernel: Array | None = None,
    ) -> Arrays:
        """The results, of operands by name."""
        left, right, ins, outs, (_, merge) = self.factors(x, dy, A, V, lam, gamma)
        dtype = accumulation_dtype(x.dtype)
        tokens = range(self.spec.token_axes)
        outputs = range(len(tokens), dy.ndim), range(len(ins), len(ins) + len(outs))
        if merge:
            dx = self.dot(dy, self.merged(kernel, left, right, (*ins, *outs)), *outputs, x.dtype)
            dW = self.dot(x, dy, tokens, tokens, dtype).reshape(left.shape[0], -1).astype(x.dtype)
            if self.spec.inputs_are_small:  # U.T is on the left
                dU = self.dot(right, dW, (1,), (1,), dtype)
            else:
                dU = self.dot(left, dW, (0,), (0,), dtype)
        else:
            left, right = left.reshape(*ins, -1), right.reshape(-1, *outs)
            thin = self.dot(dy, right, outputs[0], range(1, right.ndim), x.dtype)  # (tokens..., m)
            dx = self.dot(thin, left, (thin.ndim - 1,), (left.ndim - 1,), x.dtype)
            if kernel is not None:
                dx = self.dot(dy, kernel, *outputs, x.dtype) + dx
            if self.spec.inputs_are_small:
                dU = self.dot(thin, x, tokens, tokens, dtype)
            else:
                hidden = self.dot(x, left, range(len(tokens), x.ndim), range(len(ins)), x.dtype)
                dU = self.dot(hidden, dy, tokens, tokens, dtype)
        flat = gamma.reshape(*gamma.shape[:2], -1)
        dU = dU.reshape(dU.shape[0], -1)
        d_lam, d_gamma = _scale_gradients(A.reshape(A.shape[0], -1), lam, flat, dU)
        return {"dx": dx, "d_lam": d_lam, "d_gamma": d_gamma.reshape(gamma.shape)}


class Frozen(Pass):
    """Gives y, or of a dy the gradient of x, of the kernel alone."""

    def __call__(self, x: Array, kernel: Array, dy: Array | None = None) -> Arrays:
        """The result, of operands by name."""
        tokens = self.spec.token_axes
        ins = x.ndim - tokens
        if dy is not None:
            outputs = range(tokens, dy.ndim), range(ins, kernel.ndim)
            return {"dx": self.dot(dy, kernel, *outputs, x.dtype)}
        return {"y": self.dot(x, kernel, range(tokens, x.ndim), range(ins), self.spec.preferred)}


@dataclasses.dataclass(frozen=True)
class Dropped(Pass):
    """A pass in which each adapter's input is what its dropout keeps of x; the kernel's is x."""

    of: type[Forward] | type[Backward]

    def __call__(
        self,
        x: Array,
        keep: Array,
        lam: Array,
        gamma: Array,
        kernel: Array | None = None,
        **others: Array,
    ) -> Arrays:
        """The results, of operands by name."""
        spec = self.spec
        alone = self.of(dataclasses.replace(spec, plus_kernel=False, rates=()))
        found: dict[str, list[Array]] = {}
        if kernel is not None:
            frozen = Frozen(spec)(x=x, kernel=kernel, dy=others.get("dy"))
            found = {name: [value] for name, value in frozen.items()}
        for i, rate in enumerate(spec.rates):
            left = functools.partial(_kept, keep=keep[i], rate=rate)
            part = alone(x=left(x), lam=lam[i : i + 1], gamma=gamma[i : i + 1], **others)
            for name, value in part.items():
                found.setdefault(name, []).append(left(value) if name == "dx" else value)
        scales = ("d_lam", "d_gamma")
        return {
            name: jnp.concatenate(each) if name in scales else functools.reduce(jnp.add, each)
            for name, each in found.items()
        }


def _kept(x: Array, keep: Array, rate: float) -> Array:
    """What the dropout of one adapter leaves of x, or of its gradient."""
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x)) if rate < 1 else x * keep


class KernelGradient(Pass):
    """Gives the gradient of the kernel, for whoever trains it."""

    def __call__(self, x: Array, dy: Array) -> Arrays:
        """The result, of operands by name."""
        tokens = range(self.spec.token_axes)
        return {"d_kernel": self.dot(x, dy, tokens, tokens, accumulation_dtype(x.dtype))}
