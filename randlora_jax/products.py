"""The products of `x . (W + dW)` and of its gradients: what they cost, and one device's share.

The update is dW = L @ R with L (in, m) and R (m, out), one of which is U = lambda * A * gamma and
the other V, B flattened; m = r * n. A product with W + dW can be factored, `x.W + (x.L).R`, or
merged, `x.(W + L.R)`. Which is cheaper depends on the number of tokens, differs between the forward
and the backward pass, and is known while tracing.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from randlora_jax.kernels import wide
from randlora_jax.partitioning import Division, Factors

Strategy = Literal["auto", "merged", "factored"]


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static part of one call. The kernel is (in..., out...), x is (tokens..., in...)."""

    num_tokens: int  # how many axes of x
    num_inputs: int
    kernel_shape: tuple[int, ...]
    plus_kernel: bool
    precision: Any
    preferred: Any  # dtype of the result, None for the operands'
    strategy: Strategy

    @property
    def sides(self) -> tuple[int, int]:
        shape, i = self.kernel_shape, self.num_inputs
        return math.prod(shape[:i]), math.prod(shape[i:])

    @property
    def inputs_are_small(self) -> bool:
        """Whether U, the factor that trains, is the one that x meets first."""
        return self.sides[0] <= self.sides[1]

    @property
    def small_large(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The kernel's shape on its small and on its large side."""
        ins, outs = self.kernel_shape[: self.num_inputs], self.kernel_shape[self.num_inputs :]
        return (ins, outs) if self.inputs_are_small else (outs, ins)

    @property
    def _names(self) -> tuple[Factors, Factors, Factors]:
        """Names of the axes of tokens, inputs and outputs, as `Division` wants them."""
        counts = (self.num_tokens, self.num_inputs, len(self.kernel_shape) - self.num_inputs)
        return tuple(
            tuple(f"{name}{axis}" for axis in range(count))
            for name, count in zip("tio", counts, strict=True)
        )

    def division(self, backward: bool) -> Division:
        """How the arrays of a forward or backward pass are divided among devices."""
        t, i, o = self._names
        small, large = (i, o) if self.inputs_are_small else (o, i)
        scales = (("a", "r", "n"), ("a", "n", *small))
        kernel, dy = [i + o] * self.plus_kernel, [t + o] * backward
        operands = (*kernel, t + i, *dy, ("r", *small), (*large, "m"), *scales)
        results = (t + i, *scales) if backward else (t + o,)
        sums = (o, t + i + o, t + large) if backward else (i,)
        free = ("",) * (len(operands) - 4)
        apart = (*free, "s", "v", "", "s", *(("", "", "s") if backward else ("",)))
        return Division(operands, results, sums, t, ("a", "r", "n", "m"), apart)

    @property
    def kernel_gradient_division(self) -> Division:
        t, i, o = self._names
        return Division((t + i, t + o), (i + o,), (t,), first=t)


def cheapest(
    tokens: int,
    rows: int,
    cols: int,
    m: int,
    strategy: Strategy = "auto",
    plus_kernel: bool = True,
) -> tuple[bool, bool]:
    """Whether to merge in the forward and in the backward pass: the pair of fewest operations."""
    if strategy != "auto":
        return (strategy == "merged",) * 2
    flops = lambda ways: sum(product_flops(tokens, rows, cols, m, *ways, plus_kernel))
    return min(((f, b) for f in (True, False) for b in (True, False)), key=flops)


def product_flops(
    tokens: int,
    rows: int,
    cols: int,
    m: int,
    merged_forward: bool,
    merged_backward: bool,
    plus_kernel: bool = True,
) -> tuple[int, int]:
    """Floating point operations of the forward and of the backward pass of `x.(W + dW)`.

    For a kernel of `rows` x `cols` and m = r * n columns in the factors. The gradients are those of
    x and of the scales, the kernel being frozen. Without `plus_kernel`, of `x.dW` alone.
    """
    dense, build, thin = tokens * rows * cols, m * rows * cols, tokens * m * (rows + cols)
    base = dense if plus_kernel else 0
    forward = dense + build if merged_forward else base + thin
    if merged_backward:  # dW again (it was not kept), dx, x.T @ dy and its product with V
        backward = 2 * dense + 2 * build
    else:
        # The factor that trains meets a product that is there already, but for one case: out < in
        # with a merged forward pass, where x @ V was not computed.
        again = tokens * m * rows if cols < rows and merged_forward else 0
        backward = base + thin + tokens * m * min(rows, cols) + again
    return 2 * forward, 2 * backward


@jax.custom_jvp
def after(value, other):
    """The same value to the last bit, but not before `other` is there.

    What is made of the scales alone, XLA would make for all layers before the first of them runs,
    or keep from the forward to the backward pass: an array of a kernel's size for every layer. An
    optimization barrier does not help, since XLA takes it away before it decides on an order.
    """
    return _after(value, other)


after.defjvp(lambda primals, tangents: (after(*primals), tangents[0]))


@custom_vmap
def _after(value, other):
    if other.size == 0:
        return value
    # Nothing is greater than infinity, not even what is no number; but XLA does not know that.
    return value + (other[(0,) * other.ndim] > jnp.inf).astype(value.dtype)


@_after.def_vmap
def _(size, batched, value, other):
    # One number of all examples will do, so that a value which they share stays one.
    del size
    return _after(value, other), batched[0]


def factors(A, V, lam, gamma, inputs_are_small, dtype):
    """L (in, m) and R (m, out), of which dW = L @ R: U and V, transposed for in <= out.

    From A (r, small), V (large, m), and the lambda (a, r, n) and gamma (a, n, small) of a adapters,
    whose updates are summed.
    """
    outer = sum(lam[i][:, :, None] * gamma[i][None] for i in range(lam.shape[0]))  # (r, n, small)
    U = (outer * A[:, None].astype(outer.dtype)).reshape(-1, A.shape[-1])  # row k * n + b
    U, V = U.astype(dtype), V.astype(dtype)
    return (U.T, V.T) if inputs_are_small else (V, U)


def _scale_gradients(A, lam, gamma, dU):
    """Gradients of lambda and gamma from that of U, (m, small)."""
    (_, r, n), small = lam.shape, A.shape[-1]
    weighted = dU.reshape(r, n, small) * A[:, None].astype(dU.dtype)
    d_lam = jnp.einsum("kbj,abj->akb", weighted, gamma.astype(dU.dtype))
    d_gamma = jnp.einsum("kbj,akb->abj", weighted, lam.astype(dU.dtype))
    return d_lam.astype(lam.dtype), d_gamma.astype(gamma.dtype)


@dataclasses.dataclass(frozen=True)
class Pass:
    """One device's share of a forward or backward pass.

    Operands, with the small and the large side in the kernel's own axes: kernel (in..., out...) if
    `spec.plus_kernel`, x (tokens..., in...), dy (tokens..., out...) if backward, A (r, small...),
    V (large..., m), lambda (a, r, n), gamma (a, n, small...).
    """

    spec: Spec

    def dot(self, a, b, a_axes, b_axes, dtype):
        dims = ((tuple(a_axes), tuple(b_axes)), ((), ()))
        return lax.dot_general(a, b, dims, self.spec.precision, dtype)

    def prepare(self, x, latest, A, V, lam, gamma):
        """L (in, m), R (m, out), the shapes in and out have here, and the ways to compute.

        They are not computed before `latest`, x or dy.
        """
        spec = self.spec
        small, large = A.shape[1:], V.shape[:-1]
        left, right = factors(
            A.reshape(A.shape[0], -1), V.reshape(-1, V.shape[-1]),
            after(lam, latest), gamma.reshape(*gamma.shape[:2], -1), spec.inputs_are_small, x.dtype,
        )  # fmt: skip
        ins, outs = (small, large) if spec.inputs_are_small else (large, small)
        sizes = math.prod(x.shape[: spec.num_tokens]), left.shape[0], right.shape[1]
        ways = cheapest(*sizes, left.shape[1], spec.strategy, spec.plus_kernel)
        return left, right, ins, outs, ways

    def merged(self, kernel, left, right, shape):
        """W + L.R, accumulated in float32 and rounded once to the kernel's dtype."""
        dtype = wide(left.dtype)
        delta = self.dot(left, right, (1,), (0,), dtype).reshape(shape)
        if kernel is None:
            return delta.astype(left.dtype)
        return (kernel.astype(dtype) + delta).astype(kernel.dtype)


class Forward(Pass):
    """Gives (y,)."""

    def __call__(self, *operands):
        spec = self.spec
        kernel, (x, *rest) = (operands[0], operands[1:]) if spec.plus_kernel else (None, operands)
        left, right, ins, outs, (merge, _) = self.prepare(x, x, *rest)
        inputs = range(spec.num_tokens, x.ndim), range(len(ins))
        if merge:
            kernel = self.merged(kernel, left, right, (*ins, *outs))
            return (self.dot(x, kernel, *inputs, spec.preferred),)
        thin = self.dot(x, left.reshape(*ins, -1), *inputs, x.dtype)  # (tokens..., m)
        y = self.dot(thin, right.reshape(-1, *outs), (thin.ndim - 1,), (0,), spec.preferred)
        return (y if kernel is None else self.dot(x, kernel, *inputs, spec.preferred) + y,)


class Backward(Pass):
    """Gives the gradients of (x, lambda, gamma)."""

    def __call__(self, *operands):
        spec = self.spec
        kernel, (x, dy, *rest) = (
            (operands[0], operands[1:]) if spec.plus_kernel else (None, operands)
        )
        left, right, ins, outs, (_, merge) = self.prepare(x, dy, *rest)
        dtype = wide(x.dtype)
        tokens = range(spec.num_tokens)
        outputs = range(spec.num_tokens, dy.ndim), range(len(ins), len(ins) + len(outs))
        if merge:
            dx = self.dot(dy, self.merged(kernel, left, right, (*ins, *outs)), *outputs, x.dtype)
            dW = self.dot(x, dy, tokens, tokens, dtype).reshape(left.shape[0], -1).astype(x.dtype)
            if spec.inputs_are_small:  # U.T is on the left
                dU = self.dot(right, dW, (1,), (1,), dtype)
            else:
                dU = self.dot(left, dW, (0,), (0,), dtype)
        else:
            left, right = left.reshape(*ins, -1), right.reshape(-1, *outs)
            thin = self.dot(dy, right, outputs[0], range(1, right.ndim), x.dtype)  # (tokens..., m)
            dx = self.dot(thin, left, (thin.ndim - 1,), (left.ndim - 1,), x.dtype)
            if kernel is not None:
                dx = self.dot(dy, kernel, *outputs, x.dtype) + dx
            if spec.inputs_are_small:
                dU = self.dot(thin, x, tokens, tokens, dtype)
            else:
                hidden = self.dot(x, left, range(len(tokens), x.ndim), range(len(ins)), x.dtype)
                dU = self.dot(hidden, dy, tokens, tokens, dtype)
        A, _, lam, gamma = rest
        flat = gamma.reshape(*gamma.shape[:2], -1)
        dU = dU.reshape(dU.shape[0], -1)
        d_lam, d_gamma = _scale_gradients(A.reshape(A.shape[0], -1), lam, flat, dU)
        return dx, d_lam, d_gamma.reshape(gamma.shape)


class KernelGradient(Pass):
    """Gives (the gradient of the kernel,) from x and dy, for whoever trains it."""

    def __call__(self, x, dy):
        tokens = range(self.spec.num_tokens)
        return (self.dot(x, dy, tokens, tokens, wide(x.dtype)),)
