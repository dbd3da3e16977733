"""The RandLoRA operation: `y = x . (W + dW)` on arrays, for any layer that is a `dot_general`.

With U = (lambda * A * gamma), (m, min), and V = B flattened, (max, m), where m = r * n, the update
is dW = (V @ U).T for in <= out and V @ U otherwise, in Flax's (in, out) layout. U's rows run
rank-major and V's columns basis-major: PEFT pairs them so, and adapters move between the two
libraries only if this does too (Albert et al., arXiv 2502.00987; PEFT `tuners/randlora/layer.py`).

The product can be computed in two ways: factored, `x.W + (x.L).R` with L and R the two factors,
or merged, `x.(W + L.R)`. Which is cheaper depends on the number of tokens, differs between the
forward and the backward pass, and is known while tracing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from randlora_jax.bases import Bases, num_bases

Strategy = Literal["auto", "merged", "factored"]
Scales = tuple[jax.Array, jax.Array]  # lambda (r, n), gamma (n, min)


def delta_weight(
    randlora_A: jax.Array,
    randlora_B: jax.Array,
    randlora_lambda: jax.Array,
    randlora_gamma: jax.Array,
    in_features: int,
    out_features: int,
    scaling: float | jax.Array,
) -> jax.Array:
    """The update of one kernel, PEFT's `get_delta_weight` in Flax's layout.

    Args:
      randlora_A: (r, 1, min_dim), randlora_B: (max_dim, num_bases, r), of at least this layer.
      randlora_lambda: (r, n), randlora_gamma: (n, min(in, out)).
      scaling: `randlora_alpha / r`.

    Returns:
      (in_features, out_features), float32 or wider.

    Raises:
      ValueError: where the shapes don't fit the layer.

    Example:
      >>> bases = [jnp.ones((2, 1, 3)), jnp.ones((5, 2, 2))]
      >>> delta_weight(*bases, jnp.ones((2, 2)), jnp.ones((2, 3)), 3, 5, 0.5).tolist()[0]
      [2.0, 2.0, 2.0, 2.0, 2.0]
    """
    bases = {"randlora_A": randlora_A, "randlora_B": randlora_B}
    check_shapes(bases, (randlora_lambda.shape, randlora_gamma.shape), in_features, out_features)
    scales = ((randlora_lambda * scaling, randlora_gamma),)
    dtype = jnp.promote_types(randlora_lambda.dtype, jnp.float32)
    left, right = _factors(randlora_A, randlora_B, scales, in_features, out_features, dtype)
    return jnp.matmul(left, right, preferred_element_type=dtype)


def check_shapes(
    bases: Bases, shapes: Sequence[tuple[int, ...]], in_features: int, out_features: int
) -> None:
    """Raises a ValueError where scales don't fit the layer, or bases are too small for it."""
    A, B = bases["randlora_A"], bases["randlora_B"]
    small, large = sorted((in_features, out_features))
    r = A.shape[0]
    n = num_bases(small, r)
    for name, given, shape in zip(
        ("randlora_lambda", "randlora_gamma"), shapes, ((r, n), (n, small)), strict=True
    ):
        if tuple(given) != shape:
            raise ValueError(
                f"{name} has shape {tuple(given)}, but a kernel of {in_features} x {out_features} "
                f"with r={r} needs {shape}: is it from another model or another r?"
            )
    if A.shape[2] < small or B.shape[0] < large or B.shape[1] < n or B.shape[2] != r:
        raise ValueError(
            f"bases of shapes {A.shape} and {B.shape} are too small for a kernel of "
            f"{in_features} x {out_features}, which needs {(r, 1, small)} and {(large, n, r)}: "
            "draw them for all target modules together"
        )


def prepare_scales(bases: Bases, scales: Scales, scaling: float) -> Scales:
    """Folds alpha / r, and the size of ternary bases' entries, into lambda: (r, n) numbers."""
    lam, gamma = scales
    factor = jnp.asarray(scaling, lam.dtype)
    if "randlora_scale" in bases:
        factor = factor * jnp.prod(bases["randlora_scale"]).astype(lam.dtype)
    return lam * factor, gamma


@dataclasses.dataclass(frozen=True)
class _Spec:
    """The static part of one call. The kernel is (in..., out...): its inputs come first."""

    num_inputs: int  # how many trailing axes of x meet as many leading axes of the kernel
    kernel_shape: tuple[int, ...]
    precision: Any
    preferred: Any  # dtype of the result, None for the operands'
    strategy: Strategy
    options: tuple[tuple[str, Any], ...] = ()  # keywords of dot_general that pass through

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.kernel_shape[: self.num_inputs]

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.kernel_shape[self.num_inputs :]

    def contract(self, x) -> tuple[int, ...]:
        """The axes of x that are inputs; those before them are tokens."""
        return tuple(range(x.ndim - self.num_inputs, x.ndim))

    def ways(self, x, m: int, plus_kernel: bool) -> tuple[bool, bool]:
        """Whether the forward and the backward pass are merged: the pair of fewest operations."""
        if self.strategy != "auto":
            return (self.strategy == "merged",) * 2
        tokens = math.prod(x.shape[: x.ndim - self.num_inputs])
        rows, cols = math.prod(self.in_shape), math.prod(self.out_shape)
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


def _combined(A, scales):
    """U, (r, n, min): the sum over adapters, all on the same bases, of lambda * A * gamma."""
    outer = sum(lam[:, :, None] * gamma[None] for lam, gamma in scales)
    return outer * A[:, :, : outer.shape[-1]].astype(outer.dtype)


def _factors(A, B, scales, in_features, out_features, dtype):
    """L (in, m) and R (m, out), of which dW = L @ R: U and V, transposed for in <= out."""
    small, large = sorted((in_features, out_features))
    n = scales[0][0].shape[1]
    U = _combined(A, scales).reshape(-1, small).astype(dtype)  # row k * n + b
    V = B[:large, :n].reshape(large, -1).astype(dtype)  # column b * r + k
    return (U.T, V.T) if in_features <= out_features else (V, U)


def _scale_gradients(A, scales, dU):
    """Gradients of each adapter's (lambda, gamma) from that of U, (r * n, min)."""
    r, n = scales[0][0].shape
    small = dU.shape[-1]
    dU = dU.reshape(r, n, small)
    weighted = dU * A[:, :, :small].astype(dU.dtype)
    gradients = []
    for lam, gamma in scales:
        d_lam = jnp.einsum("kbj,bj->kb", weighted, gamma.astype(dU.dtype))
        d_gamma = jnp.einsum("kbj,kb->bj", weighted, lam.astype(dU.dtype))
        gradients.append((d_lam.astype(lam.dtype), d_gamma.astype(gamma.dtype)))
    return tuple(gradients)


def _accumulator(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _dot(spec, a, b, a_axes, b_axes, dtype):
    dims = ((tuple(a_axes), tuple(b_axes)), ((), ()))
    return lax.dot_general(a, b, dims, spec.precision, dtype)


def _base_dot(spec, x, kernel):
    dims = ((spec.contract(x), tuple(range(spec.num_inputs))), ((), ()))
    return lax.dot_general(x, kernel, dims, spec.precision, spec.preferred, **dict(spec.options))


def _merged_kernel(spec, kernel, left, right):
    """W + L.R, accumulated in float32 and rounded once to the kernel's dtype."""
    wide = _accumulator(left.dtype)
    delta = _dot(spec, left, right, (1,), (0,), wide).reshape(spec.kernel_shape)
    if kernel is None:
        return delta.astype(left.dtype)
    return (kernel.astype(wide) + delta).astype(kernel.dtype)


def _shaped(spec, left, right):
    """L as (in..., m), R as (m, out...)."""
    return left.reshape(*spec.in_shape, -1), right.reshape(-1, *spec.out_shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adapted_dot(spec, x, kernel, A, B, scales):
    return _forward(spec, x, kernel, A, B, scales)[0]


def _forward(spec, x, kernel, A, B, scales):
    rows, cols = math.prod(spec.in_shape), math.prod(spec.out_shape)
    left, right = _factors(A, B, scales, rows, cols, x.dtype)
    merged, merged_backward = spec.ways(x, left.shape[1], kernel is not None)
    hidden = None
    if merged:
        y = _base_dot(spec, x, _merged_kernel(spec, kernel, left, right))
    else:
        left, right = _shaped(spec, left, right)
        thin = _dot(spec, x, left, spec.contract(x), range(spec.num_inputs), x.dtype)
        y = _dot(spec, thin, right, (thin.ndim - 1,), (0,), spec.preferred)
        if kernel is not None:
            y = _base_dot(spec, x, kernel) + y
        if cols < rows and not merged_backward:
            hidden = thin  # (tokens..., m): the backward pass needs it, and tokens are few here
    return y, (x, kernel, A, B, scales, hidden)


def _backward(spec, residuals, dy):
    x, kernel, A, B, scales, hidden = residuals
    rows, cols = math.prod(spec.in_shape), math.prod(spec.out_shape)
    # Without the barrier XLA would find that the factors were computed in the forward pass, and
    # keep one product of a kernel's size a layer until here.
    dy, scales = lax.optimization_barrier((dy.astype(x.dtype), scales))
    left, right = _factors(A, B, scales, rows, cols, x.dtype)
    merged = spec.ways(x, left.shape[1], kernel is not None)[1]
    wide = _accumulator(x.dtype)
    tokens = range(x.ndim - spec.num_inputs)
    outs = range(len(tokens), dy.ndim)
    kernel_outs = range(spec.num_inputs, len(spec.kernel_shape))
    # dL/dW, (in..., out...): nothing is computed for a frozen kernel unless the merged way asks.
    outer = _dot(spec, x, dy, tokens, tokens, wide)
    if merged:
        weights = _merged_kernel(spec, kernel, left, right)
        dx = _dot(spec, dy, weights, outs, kernel_outs, x.dtype)
        flat = outer.reshape(rows, cols).astype(x.dtype)
        if rows <= cols:  # U.T is on the left
            dU = _dot(spec, right, flat, (1,), (1,), wide)
        else:
            dU = _dot(spec, left, flat, (0,), (0,), wide)
    else:
        left, right = _shaped(spec, left, right)
        thin = _dot(spec, dy, right, outs, range(1, right.ndim), x.dtype)  # (tokens..., m)
        dx = _dot(spec, thin, left, (thin.ndim - 1,), (left.ndim - 1,), x.dtype)
        if kernel is not None:
            dx = _dot(spec, dy, kernel, outs, kernel_outs, x.dtype) + dx
        if rows <= cols:
            dU = _dot(spec, thin, x, tokens, tokens, wide)
        else:
            if hidden is None:
                hidden = _dot(spec, x, left, spec.contract(x), range(spec.num_inputs), x.dtype)
            dU = _dot(spec, hidden, dy, tokens, tokens, wide)
    d_scales = _scale_gradients(A, scales, dU.reshape(dU.shape[0], -1))
    d_kernel = None if kernel is None else outer.astype(kernel.dtype)
    return dx, d_kernel, None, None, d_scales


_adapted_dot.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class RandLoraDotGeneral:
    """A `dot_general` whose right-hand side is `W + dW`: give it to a Flax layer.

    Attributes:
      bases: as `randlora_jax.bases.draw` gives them.
      scales: a (lambda, gamma) pair for each adapter, already through `prepare_scales`.
      dropouts: for each adapter, None or a function that acts on its input alone.
      strategy: "auto" takes the way with fewer operations, for forward and backward separately.
      dot_general: the layer's own, for the frozen product; then the update is computed beside it.
    """

    bases: Bases
    scales: Sequence[Scales]
    dropouts: Sequence[Callable[[jax.Array], jax.Array] | None] = ()
    strategy: Strategy = "auto"
    dot_general: Callable[..., jax.Array] | None = None

    def __call__(
        self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, **options
    ):
        (contract, kernel_axes), (batch, _) = dimension_numbers
        if batch or tuple(kernel_axes) != tuple(range(len(contract))):
            raise ValueError(
                f"dimension_numbers={dimension_numbers}: an adapted kernel has its input axes "
                "first and no batch axes"
            )
        static = tuple(sorted(options.items()))
        spec = _Spec(
            len(contract), rhs.shape, precision, preferred_element_type, self.strategy, static
        )
        tokens = [i for i in range(lhs.ndim) if i not in contract]

        def adapted(x, kernel, scales):
            x = lax.transpose(x, (*tokens, *contract))  # nothing to do for a trailing contraction
            A, B = self.bases["randlora_A"], self.bases["randlora_B"]
            return _adapted_dot(spec, x, kernel, A, B, tuple(scales))

        if not any(self.dropouts) and self.dot_general is None:
            return adapted(lhs, rhs, self.scales)
        y = (self.dot_general or lax.dot_general)(
            lhs, rhs, dimension_numbers, precision=precision,
            preferred_element_type=preferred_element_type, **options,
        )  # fmt: skip
        dropouts = self.dropouts or (None,) * len(self.scales)
        for pair, dropout in zip(self.scales, dropouts, strict=True):
            x = lhs if dropout is None else dropout(lhs)
            y = y + adapted(x, None, (pair,)).astype(y.dtype)
        return y
