"""The products of `x . (W + dW)` and of its gradients: one device's share.

The update is dW = L @ R with L (in, m) and R (m, out), one of which is U = lambda * A * gamma and
the other V, B flattened; m = r * n. `spec` says what the operands are. Each is kept as it comes,
U (m, small...) and V (large..., m): of a few tokens' product, a transposed copy would be the most.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from randlora_jax.ops.costs import Way, cheapest
from randlora_jax.ops.partitioning import Arrays
from randlora_jax.ops.spec import Spec
from randlora_jax.ops.vectors import Vectors

Axes = Sequence[int]
Factor = tuple[Array, int]  # and which of its axes is that of m


class Factors(NamedTuple):
    """L and R."""

    left: Factor
    right: Factor


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


def factor(A: Array, lam: Array, gamma: Array, dtype: Any) -> Array:
    """U (m, small), of A (r, small), and lambda (a, r, n) and gamma (a, n, small) of a adapters.

    Their updates are summed. Row k * n + b belongs to column k * n + b of V.
    """
    outers = (lam[i][:, :, None] * gamma[i][None] for i in range(lam.shape[0]))
    outer = functools.reduce(jnp.add, outers)  # (r, n, small)
    return (outer * A[:, None].astype(outer.dtype)).reshape(-1, A.shape[-1]).astype(dtype)


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

    def ways(self, x: Array, A: Array, V: Array, lam: Array) -> tuple[Way, Way]:
        """How to compute the forward and the backward pass here, of this device's sizes."""
        tokens = math.prod(x.shape[: self.spec.token_axes])
        small, large = math.prod(A.shape[1:]), math.prod(V.shape[:-1])
        sizes = (small, large) if self.spec.inputs_are_small else (large, small)
        count, r, n = lam.shape
        return cheapest(tokens, *sizes, (r, n), self.spec.strategy, self.spec.plus_kernel, count)

    def factors(self, latest: Array, A: Array, V: Array, lam: Array, gamma: Array) -> Factors:
        """L and R, of which one is U, which is not computed before `latest`, x or dy."""
        flat = gamma.reshape(*gamma.shape[:2], -1)
        U = factor(A.reshape(A.shape[0], -1), computed_after(lam, latest), flat, latest.dtype)
        U = U.reshape(-1, *A.shape[1:])
        V = V.astype(latest.dtype)
        if self.spec.inputs_are_small:
            return Factors((U, 0), (V, V.ndim - 1))
        return Factors((V, V.ndim - 1), (U, 0))

    def onto(self, x: Array, factor: Factor, dtype: Any) -> Array:
        """(tokens..., m): x or dy, contracted along all of the factor's axes but that of m."""
        array, m = factor
        others = [i for i in range(array.ndim) if i != m]
        return self.dot(x, array, range(x.ndim - len(others), x.ndim), others, dtype)

    def off(self, thin: Array, factor: Factor, dtype: Any) -> Array:
        """What is (tokens..., m), on the factor's axes in place of m."""
        return self.dot(thin, factor[0], (thin.ndim - 1,), (factor[1],), dtype)

    def merged(self, kernel: Array | None, factors: Factors) -> Array:
        """W + L.R, accumulated in float32 and rounded once to the kernel's dtype."""
        (left, of_left), (right, of_right) = factors
        dtype = accumulation_dtype(left.dtype)
        delta = self.dot(left, right, (of_left,), (of_right,), dtype)
        if kernel is None:
            return delta.astype(left.dtype)
        return (kernel.astype(dtype) + delta).astype(kernel.dtype)

    def vectors(self, x: Array, A: Array, V: Array, lam: Array, gamma: Array) -> Vectors:
        """The update in the form for few tokens."""
        return Vectors(A, V, lam, gamma, self.spec, accumulation_dtype(x.dtype))


class Forward(Pass):
    """Gives y."""

    def __call__(
        self, x: Array, A: Array, V: Array, lam: Array, gamma: Array, kernel: Array | None = None
    ) -> Arrays:
        """The result, of operands by name."""
        spec, (way, _) = self.spec, self.ways(x, A, V, lam)
        if way == "merged":
            merged = self.merged(kernel, self.factors(x, A, V, lam, gamma))
            return Frozen(spec)(x=x, kernel=merged)
        if way == "vectors":
            y = self.vectors(x, A, V, lam, gamma).product(x)
        else:
            left, right = self.factors(x, A, V, lam, gamma)
            y = self.off(self.onto(x, left, x.dtype), right, spec.preferred)
        return {"y": y if kernel is None else Frozen(spec)(x=x, kernel=kernel)["y"] + y}


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
        spec, (_, way) = self.spec, self.ways(x, A, V, lam)
        if way == "vectors":
            found = self.vectors(x, A, V, lam, gamma).gradients(x, dy)
        else:
            found = self._through_factors(way, x, dy, A, V, lam, gamma, kernel)
        if kernel is not None and way != "merged":
            frozen = Frozen(spec)(x=x, kernel=kernel, dy=dy)
            found["dx"] = frozen["dx"] + found["dx"]
        return found

    def _through_factors(self, way, x, dy, A, V, lam, gamma, kernel) -> Arrays:
        spec, dtype = self.spec, accumulation_dtype(x.dtype)
        factors = self.factors(dy, A, V, lam, gamma)
        left, right = factors
        tokens = range(spec.token_axes)
        if way == "merged":
            dx = Frozen(spec)(x=x, kernel=self.merged(kernel, factors), dy=dy)["dx"]
            dW = self.dot(x, dy, tokens, tokens, dtype).astype(x.dtype)
            ins = x.ndim - spec.token_axes
            V, m = right if spec.inputs_are_small else left
            met = range(ins, dW.ndim) if spec.inputs_are_small else range(ins)
            others = [i for i in range(V.ndim) if i != m]
            dU = self.dot(V, dW, others, met, dtype)
        else:
            thin = self.onto(dy, right, x.dtype)
            dx = self.off(thin, left, x.dtype)
            if spec.inputs_are_small:
                dU = self.dot(thin, x, tokens, tokens, dtype)
            else:
                dU = self.dot(self.onto(x, left, x.dtype), dy, tokens, tokens, dtype)
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


class KernelGradient(Pass):
    """Gives the gradient of the kernel, for whoever trains it."""

    def __call__(self, x: Array, dy: Array) -> Arrays:
        """The result, of operands by name."""
        tokens = range(self.spec.token_axes)
        return {"d_kernel": self.dot(x, dy, tokens, tokens, accumulation_dtype(x.dtype))}
