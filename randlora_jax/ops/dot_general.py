"""The RandLoRA operation: `y = x . (W + dW)` on arrays, for any layer that is a `dot_general`.

With U = (lambda * A * gamma), (m, min), and V = B flattened, (max, m), where m = r * n, the update
is dW = (V @ U).T for in <= out and V @ U otherwise, in Flax's (in, out) layout. U's rows run
rank-major and V's columns basis-major: PEFT pairs them so, and adapters move between the two
libraries only if this does too (Albert et al., arXiv 2502.00987; PEFT `tuners/randlora/layer.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from randlora_jax.bases import Bases, num_bases
from randlora_jax.ops.costs import Strategy, product_flops
from randlora_jax.ops.division import Told, mesh_axes
from randlora_jax.ops.product_vjp import product
from randlora_jax.ops.products import accumulation_dtype, factors
from randlora_jax.ops.spec import Spec

Scales = tuple[jax.Array, jax.Array]  # lambda (r, n), gamma (n, min(in, out))


@dataclasses.dataclass(frozen=True)
class Dropout:
    """An adapter's dropout: Flax's own layer, which draws, and its rate."""

    rate: float
    layer: Callable[[jax.Array], jax.Array]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x)

    def keep(self, x: jax.Array) -> jax.Array:
        """Which of x's numbers the layer keeps, as it would in its next call."""
        # Undivided: where types say that x is divided, Flax's layer would not take it.
        return self.layer(jnp.ones(x.shape, x.dtype)) != 0


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
    features = in_features, out_features
    check_fit(bases, features, (randlora_lambda.shape, randlora_gamma.shape))
    dtype = accumulation_dtype(randlora_lambda.dtype)
    small, large = sorted((in_features, out_features))
    V = randlora_B[:large, : randlora_lambda.shape[1]].reshape(large, -1)
    scales = (randlora_lambda * scaling)[None], randlora_gamma[None]
    inputs_are_small = in_features <= out_features
    left, right = factors(randlora_A[:, 0, :small], V, *scales, inputs_are_small, dtype)
    return jnp.matmul(left, right, preferred_element_type=dtype)


def check_fit(bases: Bases, features: tuple[int, int], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raises a ValueError where scales don't fit the layer, or bases are too small for it."""
    A, B = bases["randlora_A"], bases["randlora_B"]
    small, large = sorted(features)
    named = " x ".join(map(str, features))
    r = A.shape[0]
    n = num_bases(small, r)
    for name, given, shape in zip(
        ("randlora_lambda", "randlora_gamma"), shapes, ((r, n), (n, small)), strict=True
    ):
        if tuple(given) != shape:
            raise ValueError(
                f"{name} has shape {tuple(given)}, but a kernel of {named} "
                f"with r={r} needs {shape}: is it from another model or another r?"
            )
    if A.shape[2] < small or B.shape[0] < large or B.shape[1] < n or B.shape[2] != r:
        raise ValueError(
            f"bases of shapes {A.shape} and {B.shape} are too small for a kernel of "
            f"{named}, which needs {(r, 1, small)} and {(large, n, r)}: "
            "draw them for all target modules together"
        )


def prepare_scales(bases: Bases, scales: Scales, scaling: float) -> Scales:
    """Folds alpha / r, and the size of ternary bases' entries, into lambda: (r, n) numbers."""
    lam, gamma = scales
    if "randlora_scale" in bases:
        lam = lam * jnp.prod(bases["randlora_scale"]).astype(lam.dtype)
    return lam * scaling, gamma


@dataclasses.dataclass(frozen=True)
class RandLoraDotGeneral:
    """A `dot_general` whose right-hand side is `W + dW`: give it to a Flax layer.

    Attributes:
      bases: as `draw_bases` gives them.
      scales: a (lambda, gamma) pair for each adapter, already multiplied by its scaling.
      dropouts: for each adapter, None or the `randlora_jax.ops.Dropout` of its input.
      strategy: "auto" takes the way with fewer operations, for forward and backward separately.
      told: how the layer's arrays are divided among devices, where that is known before compiling.
      dot_general: the layer's own, for the frozen product; then the update is computed beside it.
    """

    bases: Bases
    scales: Sequence[Scales]
    dropouts: Sequence[Dropout | None] = ()
    strategy: Strategy = "auto"
    told: Told | None = None
    dot_general: Callable[..., jax.Array] | None = None

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        **options: Any,
    ) -> jax.Array:
        """`lax.dot_general` of x and the kernel, its input axes first, with the updates in it."""
        (contract, kernel_axes), (batch, _) = dimension_numbers
        if batch or tuple(kernel_axes) != tuple(range(len(contract))):
            raise ValueError(
                f"dimension_numbers={dimension_numbers}: an adapted kernel has its input axes "
                "first and no batch axes"
            )
        features = _features(rhs.shape, contract)
        for lam, gamma in self.scales:
            check_fit(self.bases, features, (lam.shape, gamma.shape))
        options = {"preferred_element_type": preferred_element_type, **options}
        call = lhs, tuple(contract), rhs.shape, precision
        if self.dot_general is None:
            return self._product(*call, rhs, **options)
        y = self.dot_general(lhs, rhs, dimension_numbers, precision=precision, **options)
        return y + self.update(*call, **options).astype(y.dtype)

    def update(
        self,
        x: jax.Array,
        contract: tuple[int, ...],
        kernel_shape: tuple[int, ...],
        precision: Any = None,
        **options: Any,
    ) -> jax.Array:
        """x . dW alone, for a layer that has computed x . W by itself.

        Args:
          x: contracted along the axes `contract`.
          kernel_shape: with the input axes first, in the order of `contract`.
          precision, **options: as for `lax.dot_general`.
        """
        return self._product(x, contract, kernel_shape, precision, None, **options)

    def is_better_beside(
        self, x: jax.Array, contract: tuple[int, ...], kernel_shape: tuple[int, ...]
    ) -> bool:
        """Whether `update` is cheaper than adding dW to the kernel, of which it would be a sum."""
        if any(self.dropouts):
            return True
        features = _features(kernel_shape, contract)
        tokens = math.prod(x.shape) // features[0]
        m = math.prod(self.scales[0][0].shape)
        cost = lambda merge: sum(product_flops(tokens, *features, m, merge, merge))
        cheaper = not isinstance(tokens, int) or cost(merge=False) < cost(merge=True)
        return self.strategy == "factored" or (self.strategy == "auto" and cheaper)

    def _product(
        self, x, contract, kernel_shape, precision, kernel,
        preferred_element_type=None, out_sharding=None,
    ) -> jax.Array:  # fmt: skip
        tokens, rates = x.ndim - len(contract), [d.rate if d else 0.0 for d in self.dropouts]
        spec = Spec(
            tokens, len(contract), kernel_shape, kernel is not None, precision,
            preferred_element_type, self.strategy, tuple(rates) if any(rates) else (),
            _out_axes(out_sharding, tokens), self.told,
        )  # fmt: skip
        A, B = self.bases["randlora_A"], self.bases["randlora_B"]
        operands = {"x": x, "A": A, "B": B, "scales": tuple(self.scales)}
        if kernel is not None:
            operands["kernel"] = kernel
        if spec.rates:
            kept = (d.keep(x) if d else jnp.ones_like(x, bool) for d in self.dropouts)
            operands["keep"] = tuple(kept)
        y = product(spec, contract, operands)
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def _out_axes(out_sharding: Any, tokens: int) -> tuple[tuple[str, ...], ...]:
    """The mesh's axes that are wanted for each axis of the outputs."""
    spec = getattr(out_sharding, "spec", out_sharding) or ()
    return tuple(mesh_axes(entry) for entry in tuple(spec)[tokens:])


def _features(kernel_shape, contract) -> tuple[int, int]:
    inputs = len(contract)
    return math.prod(kernel_shape[:inputs]), math.prod(kernel_shape[inputs:])
