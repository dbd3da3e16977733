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
from randlora_jax.ops.division import Told
from randlora_jax.ops.product_vjp import product
from randlora_jax.ops.products import accumulation_dtype, factor
from randlora_jax.ops.quantised import grid_and_arrays
from randlora_jax.ops.spec import Spec
from randlora_jax.placement import mesh_axes, whole
from randlora_jax.quantised import floats

# lambda (..., r, n), gamma (..., n, min(in, out)), where a kernel is a stack of matrices itself
Scales = tuple[jax.Array, jax.Array]


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
      randlora_lambda: (..., r, n), randlora_gamma: (..., n, min(in, out)).
      scaling: `randlora_alpha / r`.

    Returns:
      (..., in_features, out_features), float32 or wider.

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
    A = randlora_A[:, 0, :small]
    V = whole(randlora_B)[:large, : randlora_lambda.shape[-1]].reshape(large, -1)

    def one(lam, gamma):
        U = factor(A, lam[None], gamma[None], dtype)
        matrix = jnp.matmul(V.astype(dtype), U, preferred_element_type=dtype)  # (large, small)
        return matrix.T if in_features <= out_features else matrix

    for _ in range(randlora_lambda.ndim - 2):
        one = jax.vmap(one)
    return one(randlora_lambda * scaling, randlora_gamma)


def check_fit(bases: Bases, features: tuple[int, int], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raises a ValueError where scales don't fit the layer, or bases are too small for it.

    Args:
      features: (in, out), of each matrix.
      shapes: of lambda and gamma, of which the last two axes count.
    """
    A, B = bases["randlora_A"], bases["randlora_B"]
    small, large = sorted(features)
    named = " x ".join(map(str, features))
    r = A.shape[0]
    n = num_bases(small, r)
    for name, given, shape in zip(
        ("randlora_lambda", "randlora_gamma"), shapes, ((r, n), (n, small)), strict=True
    ):
        if tuple(given)[-2:] != shape:
            raise ValueError(
                f"{name} has shape {tuple(given)[-2:]}, but a kernel of {named} "
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
      scales: a (lambda, gamma) pair for each adapter, already multiplied by its scaling; behind the
        axes of a stack one pair may have those of rows, x's first axes of tokens, too.
      dropouts: for each adapter, None or the `randlora_jax.ops.Dropout` of its input.
      strategy: "auto" takes the way with fewer operations, for forward and backward separately.
      told: how the layer's arrays are divided among devices, where that is known before compiling.
      dot_general: the layer's own, for the frozen product; then the update is computed beside it.
      kernel: a `qwix.QArray`, where the kernel is quantised: the right-hand side, of which it has
        the shape, says no more than its dtype then.
      name: of the layer, for errors.
    """

    bases: Bases
    scales: Sequence[Scales]
    dropouts: Sequence[Dropout | None] = ()
    strategy: Strategy = "auto"
    told: Told | None = None
    dot_general: Callable[..., jax.Array] | None = None
    kernel: Any = None
    name: str = "the layer"

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        **options: Any,
    ) -> jax.Array:
        """`lax.dot_general` of x and the kernel, with the updates in it.

        The kernel's axes are those of a stack, if it is one, then the inputs, then the outputs.
        """
        (contract, kernel_axes), (batch, stacked) = dimension_numbers
        if (*stacked, *kernel_axes) != tuple(range(len(batch) + len(contract))):
            raise ValueError(
                f"dimension_numbers={dimension_numbers}: an adapted kernel has its batch axes "
                "first, and then its input axes"
            )
        _, ins, outs = _split(rhs.shape, len(batch), len(contract))
        for lam, gamma in self.scales:
            check_fit(self.bases, (math.prod(ins), math.prod(outs)), (lam.shape, gamma.shape))
        options = {"preferred_element_type": preferred_element_type, **options}
        call = lhs, tuple(batch), tuple(contract), rhs.shape, precision
        self._check_rows(*call[:3])
        if self.dot_general is None:
            return self._product(*call, rhs, **options)
        if self.kernel is not None:
            rhs = floats(self.kernel).astype(rhs.dtype)
        y = self.dot_general(lhs, rhs, dimension_numbers, precision=precision, **options)
        if not self.scales:
            return y
        return y + self.update(*call, **options).astype(y.dtype)

    def update(
        self,
        x: jax.Array,
        batch: tuple[int, ...],
        contract: tuple[int, ...],
        kernel_shape: tuple[int, ...],
        precision: Any = None,
        **options: Any,
    ) -> jax.Array:
        """x . dW alone, for a layer that has computed x . W by itself.

        Args:
          x: its axes `batch` meet those of a stack, and `contract` the inputs.
          kernel_shape: (batch..., inputs..., outputs...), each in the order of x's.
          precision, **options: as for `lax.dot_general`.
        """
        self._check_rows(x, batch, contract)
        return self._product(x, batch, contract, kernel_shape, precision, None, **options)

    def is_better_beside(
        self,
        x: jax.Array,
        batch: tuple[int, ...],
        contract: tuple[int, ...],
        kernel_shape: tuple[int, ...],
    ) -> bool:
        """Whether `update` is cheaper than adding dW to the kernel, of which it would be a sum."""
        if any(self.dropouts) or self._rows(batch):  # each row would need a kernel of its own
            return True
        sizes = (math.prod(part) for part in _split(kernel_shape, len(batch), len(contract)))
        matrices, ins, outs = sizes
        tokens = math.prod(x.shape) // (matrices * ins)
        m = math.prod(self.scales[0][0].shape[-2:])
        cost = lambda way: sum(product_flops(tokens, ins, outs, m, way, way))
        cheaper = not isinstance(tokens, int) or cost("factored") < cost("merged")
        return self.strategy != "merged" and (self.strategy != "auto" or cheaper)

    def _product(
        self, x, batch, contract, kernel_shape, precision, kernel,
        preferred_element_type=None, out_sharding=None,
    ) -> jax.Array:  # fmt: skip
        tokens = x.ndim - len(batch) - len(contract)
        grid, arrays = None, {} if kernel is None else {"kernel": kernel}
        if kernel is not None and self.kernel is not None:
            grid, arrays = grid_and_arrays(self.kernel, len(batch), kernel.dtype)
        spec = Spec(
            tokens, len(contract), kernel_shape[len(batch) :], kernel is not None, precision,
            preferred_element_type, self.strategy, self._rates,
            _out_axes(out_sharding, len(batch) + tokens), self.told, len(batch),
            grid, bool(self.scales), len(self._rows(batch)),
        )  # fmt: skip
        operands: dict[str, Any] = {"x": x, **arrays}
        if self.scales:
            operands |= {name[-1]: self.bases[name] for name in ("randlora_A", "randlora_B")}
            operands["scales"] = tuple(self.scales)
        if spec.rates:
            kept = (d.keep(x) if d else jnp.ones_like(x, bool) for d in self.dropouts)
            operands["keep"] = tuple(kept)
        y = product(spec, batch, contract, operands)
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)

    def _rows(self, batch: Sequence[int]) -> tuple[int, ...]:
        return self.scales[0][0].shape[len(batch) : -2] if self.scales else ()

    def _check_rows(self, x: jax.Array, batch: Sequence[int], contract: Sequence[int]) -> None:
        """Raises a ValueError where the rows of scales are not those of x's first axes."""
        rows = self._rows(batch)
        first = any(axis < len(rows) for axis in (*batch, *contract))
        if first or x.shape[: len(rows)] != rows:
            raise ValueError(
                f"{self.name}: adapter_ids have the shape {rows}, which is not how its input of "
                f"{x.shape} begins, tokens alone: give one for each of its first axis, as in a "
                "batch, for each of its first axes, or one for all"
            )

    @property
    def _rates(self) -> tuple[float, ...]:
        """Of each adapter's dropout, if there is one."""
        rates = tuple(d.rate if d else 0.0 for d in self.dropouts)
        return rates if any(rates) else ()


def _out_axes(out_sharding: Any, others: int) -> tuple[tuple[str, ...], ...]:
    """The mesh's axes that are wanted for each axis of the outputs, behind others of the result."""
    spec = getattr(out_sharding, "spec", out_sharding) or ()
    return tuple(mesh_axes(entry) for entry in tuple(spec)[others:])


def _split(shape: tuple[int, ...], stacked: int, inputs: int) -> tuple[tuple[int, ...], ...]:
    """A kernel's sizes: of the stack, of the inputs, of the outputs."""
    return shape[:stacked], shape[stacked : stacked + inputs], shape[stacked + inputs :]
