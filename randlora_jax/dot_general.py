"""The RandLoRA operation: `y = x . (W + dW)` on arrays, for any layer that is a `dot_general`.

With U = (lambda * A * gamma), (m, min), and V = B flattened, (max, m), where m = r * n, the update
is dW = (V @ U).T for in <= out and V @ U otherwise, in Flax's (in, out) layout. U's rows run
rank-major and V's columns basis-major: PEFT pairs them so, and adapters move between the two
libraries only if this does too (Albert et al., arXiv 2502.00987; PEFT `tuners/randlora/layer.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from randlora_jax.bases import Bases, num_bases
from randlora_jax.kernels import Kernel, wide
from randlora_jax.partitioning import like, per_device
from randlora_jax.products import (
    Backward,
    Forward,
    KernelGradient,
    Spec,
    Strategy,
    factors,
    product_flops,
)

Scales = tuple[jax.Array, jax.Array]  # lambda (r, n), gamma (n, min(in, out))


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
    dtype = wide(randlora_lambda.dtype)
    small, large = sorted((in_features, out_features))
    V = randlora_B[:large, : randlora_lambda.shape[1]].reshape(large, -1)
    scales = (randlora_lambda * scaling)[None], randlora_gamma[None]
    is_wide = in_features <= out_features
    left, right = factors(randlora_A[:, 0, :small], V, *scales, is_wide, dtype)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adapted_dot(spec, x, kernel, A, B, lam, gamma):
    return _forward(spec, x, kernel, A, B, lam, gamma)[0]


def _sliced(spec, A, B, lam, gamma):
    """The layer's own part of the bases, and gamma, in the kernel's own axes."""
    small, large = spec.small_large
    (_, r, n), size = lam.shape, math.prod(small)
    V = B[: math.prod(large), :n].reshape(*large, n * r)  # column b * r + k
    return A[:, 0, :size].reshape(r, *small), V, lam, gamma.reshape(*gamma.shape[:2], *small)


def _forward(spec, x, kernel, A, B, lam, gamma):
    operands = ([kernel] if spec.plus_kernel else []) + [x, *_sliced(spec, A, B, lam, gamma)]
    (y,) = per_device(Forward(spec), spec.division(backward=False), *operands)
    return y, (x, kernel, A, B, lam, gamma)


def _backward(spec, residuals, dy):
    x, kernel, A, B, lam, gamma = residuals
    dy = dy.astype(x.dtype)
    operands = ([kernel] if spec.plus_kernel else []) + [x, dy, *_sliced(spec, A, B, lam, gamma)]
    dx, d_lam, d_gamma = per_device(Backward(spec), spec.division(backward=True), *operands)
    d_kernel = None
    if spec.plus_kernel:  # apart from the rest: nobody pays for it who does not ask for it
        (d_kernel,) = per_device(KernelGradient(spec), spec.kernel_gradient_division, x, dy)
        d_kernel = like(d_kernel.astype(kernel.dtype), kernel)
    d_gamma = d_gamma.reshape(gamma.shape)
    return like(dx, x), d_kernel, None, None, like(d_lam, lam), like(d_gamma, gamma)


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
        sides = math.prod(rhs.shape[: len(contract)]), math.prod(rhs.shape[len(contract) :])
        for lam, gamma in self.scales:
            check_shapes(self.bases, (lam.shape, gamma.shape), *sides)
        options = {"preferred_element_type": preferred_element_type, **options}
        product = functools.partial(self._product, lhs, contract, rhs.shape, precision, **options)
        if not any(self.dropouts) and self.dot_general is None:
            return product(rhs, self.scales)
        own = self.dot_general or lax.dot_general
        y = own(lhs, rhs, dimension_numbers, precision=precision, **options)
        for part in self._parts(product):
            y = y + part.astype(y.dtype)
        return y

    def update(self, x: jax.Array, contract: tuple[int, ...], kernel: Kernel) -> jax.Array:
        """x . dW alone, for a layer that has computed x . W by itself."""
        shape = tuple(kernel.shape[i] for i in (*kernel.input_axes, *kernel.output_axes))
        product = functools.partial(self._product, x, contract, shape, None)
        return sum(self._parts(product))

    def is_better_beside(self, x: jax.Array, contract: tuple[int, ...], kernel: Kernel) -> bool:
        """Whether `update` is cheaper than adding dW to the kernel, of which it would be a sum."""
        if any(self.dropouts):
            return True
        tokens = math.prod(x.shape) // kernel.in_features
        m = math.prod(self.scales[0][0].shape)
        cost = lambda merge: sum(product_flops(tokens, *kernel.sides, m, merge, merge))
        return self.strategy == "factored" or (
            self.strategy == "auto" and cost(merge=False) < cost(merge=True)
        )

    def _parts(self, product):
        """The products of x with the updates: of all at once, unless each has its own x."""
        if not any(self.dropouts):
            yield product(None, self.scales)
            return
        for pair, dropout in zip(self.scales, self.dropouts, strict=True):
            yield product(None, (pair,), dropout=dropout)

    def _product(
        self, x, contract, shape, precision, kernel, scales,
        preferred_element_type=None, out_sharding=None, dropout=None,
    ):  # fmt: skip
        tokens = [i for i in range(x.ndim) if i not in contract]
        spec = Spec(
            len(tokens), len(contract), shape, kernel is not None, precision,
            preferred_element_type, self.strategy,
        )  # fmt: skip
        x = x if dropout is None else dropout(x)
        x = lax.transpose(x, (*tokens, *contract))  # nothing to do for a trailing contraction
        A, B = self.bases["randlora_A"], self.bases["randlora_B"]
        lam, gamma = (jnp.stack(each) for each in zip(*scales, strict=True))
        y = _adapted_dot(spec, x, kernel, A, B, lam, gamma)
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)
