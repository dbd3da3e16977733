"""`x . dW` of few tokens, from the vectors that the factor U is made of, without U itself.

On its small side the update is a sum over A (r, small), lambda (r, n) and gamma (n, small), and any
two of these may meet x first. Met by A or by gamma, x has min(r, n) numbers for each of its own; U
has r * n, whatever the tokens are. What each pass needs are two linear maps, one the other's
transpose: `onto` takes the small side to the hidden (r, n), and `off` takes it back. The large
side meets V, whose own axis is contracted: of one token, a transposed copy would be the most.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from randlora_jax.ops.partitioning import Arrays
from randlora_jax.ops.spec import Spec


@dataclasses.dataclass(frozen=True)
class Vectors:
    """The updates of a adapters, for few tokens.

    Attributes:
      A: (r, small...), V: (large..., m).
      lam: (a, r, n), gamma: (a, n, small...).
      spec: of the call.
      dtype: to accumulate in.
    """

    A: Array
    V: Array
    lam: Array
    gamma: Array
    spec: Spec
    dtype: Any

    def product(self, x: Array) -> Array:
        """x . dW."""
        preferred = self.spec.preferred or x.dtype
        if self.spec.inputs_are_small:
            hidden = jnp.sum(self._scaled(self._onto(x)), 1)
            return self._from_hidden(hidden.astype(x.dtype), x, preferred)
        y = self._off(self._scaled(self._hidden(x)).astype(x.dtype))
        return y.reshape(*self._tokens(x), *self.A.shape[1:]).astype(preferred)

    def gradients(self, x: Array, dy: Array) -> Arrays:
        """Those of x, lambda and gamma."""
        small, large = (x, dy) if self.spec.inputs_are_small else (dy, x)
        hidden, met = self._hidden(large), self._onto(small)
        scaled = self._scaled(hidden).astype(x.dtype)
        if self.spec.inputs_are_small:
            dx = self._off(scaled).reshape(x.shape).astype(x.dtype)
        else:
            back = jnp.sum(self._scaled(met), 1).astype(x.dtype)
            dx = self._from_hidden(back, x, x.dtype)
        return {
            "dx": dx,
            "d_lam": jnp.sum(hidden * met, 0).astype(self.lam.dtype),
            "d_gamma": self._gamma_gradient(scaled, small).astype(self.gamma.dtype),
        }

    @property
    def _by_A(self) -> bool:
        """Whether x meets A first, and else gamma."""
        return self.A.shape[0] < self.lam.shape[-1]

    def _tokens(self, x: Array) -> tuple[int, ...]:
        return x.shape[: self.spec.token_axes]

    def _flat(self, array: Array, axes: int, dtype: Any) -> Array:
        """A, gamma, or what is of the small side, with one axis for that side."""
        return array.reshape(*array.shape[:axes], -1).astype(dtype)

    def _rows(self, x: Array) -> Array:
        """(t, small) of what is of the small side."""
        return x.reshape(math.prod(self._tokens(x)), -1)

    @functools.cached_property
    def _sum(self) -> Any:
        of_call = {"precision": self.spec.precision, "preferred_element_type": self.dtype}
        return functools.partial(jnp.einsum, **of_call)

    def _met_by_A(self, x: Array) -> Array:
        """(t, r, small)"""
        return self._rows(x)[:, None] * self._flat(self.A, 1, x.dtype)[None]

    def _onto(self, x: Array) -> Array:
        """(t, a, r, n): each adapter's part of x on the small side, before its lambda."""
        gamma = self._flat(self.gamma, 2, x.dtype)
        if self._by_A:
            return self._sum("tkj,abj->takb", self._met_by_A(x), gamma)
        met = self._rows(x)[:, None, None] * gamma[None]
        return self._sum("tabj,kj->takb", met, self._flat(self.A, 1, x.dtype))

    def _off(self, hidden: Array) -> Array:
        """(t, small): the transpose of `_onto`, summed over adapters."""
        gamma, A = self._flat(self.gamma, 2, hidden.dtype), self._flat(self.A, 1, hidden.dtype)
        if self._by_A:
            return jnp.sum(
                self._sum("takb,abj->tkj", hidden, gamma) * A[None].astype(self.dtype), 1
            )
        met = self._sum("takb,kj->tabj", hidden, A)
        return jnp.sum(met * gamma[None].astype(self.dtype), (1, 2))

    def _gamma_gradient(self, hidden: Array, x: Array) -> Array:
        if self._by_A:
            found = self._sum("takb,tkj->abj", hidden, self._met_by_A(x))
        else:
            met = self._sum("takb,kj->tabj", hidden, self._flat(self.A, 1, hidden.dtype))
            found = jnp.sum(met * self._rows(x)[:, None, None].astype(self.dtype), 0)
        return found.reshape(self.gamma.shape)

    def _scaled(self, hidden: Array) -> Array:
        """(t, a, r, n), multiplied by lambda."""
        return hidden * self.lam[None].astype(self.dtype)

    def _hidden(self, x: Array) -> Array:
        """(t, 1, r, n): what is of the large side, contracted with V."""
        tokens, sides = self.spec.token_axes, self.V.ndim - 1
        dims = ((tuple(range(tokens, tokens + sides)), tuple(range(sides))), ((), ()))
        V = self.V.astype(x.dtype)
        hidden = jax.lax.dot_general(x, V, dims, self.spec.precision, self.dtype)
        return hidden.reshape(math.prod(self._tokens(x)), 1, *self.lam.shape[1:])

    def _from_hidden(self, hidden: Array, x: Array, dtype: Any) -> Array:
        """(tokens..., large...) of x's tokens: the transpose of `_hidden`."""
        thin = hidden.reshape(*self._tokens(x), -1)
        V = self.V.astype(thin.dtype)
        dims = (((thin.ndim - 1,), (V.ndim - 1,)), ((), ()))
        return jax.lax.dot_general(thin, V, dims, self.spec.precision, dtype)
