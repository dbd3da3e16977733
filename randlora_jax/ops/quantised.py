"""A frozen kernel as qwix holds it, codes and the scale of each tile of them, in one product.

It becomes floats in each pass anew, on each device from its own codes, and not before that pass has
reached the layer: then neither pass keeps a float kernel for the other, or for another layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from randlora_jax.ops.partitioning import Arrays
from randlora_jax.ops.products import Backward, Dropped, Forward, Frozen, computed_after
from randlora_jax.ops.spec import Grid, Spec

BESIDE = ("scale", "zero_point")  # what a `qwix.QArray` has beside its codes, "qvalue"


def grid_and_arrays(kernel: Any, stacked: int, dtype: Any) -> tuple[Grid, Arrays]:
    """What a product needs of a `qwix.QArray`, its arrays by name.

    Args:
      stacked: how many leading axes are those of a stack, of which each layer has its own scale.
      dtype: of the floats that it is to be.
    """
    arrays = {}
    for name in BESIDE:
        value = getattr(kernel, name)
        if value is not None:
            for axis in range(stacked):
                value = jnp.repeat(value, kernel.shape[axis] // value.shape[axis], axis)
            arrays[name] = value
    beside = tuple((name, value.shape[stacked:]) for name, value in arrays.items())
    return Grid(kernel.qtype, beside, jnp.dtype(dtype)), {"kernel": kernel.qvalue, **arrays}


@dataclasses.dataclass(frozen=True)
class Dequantised:
    """A pass over codes: one over floats, which are made of them here."""

    of: Callable[..., Arrays]
    grid: Grid

    def __call__(self, x: jax.Array, kernel: jax.Array, **others: jax.Array) -> Arrays:
        """The results, of operands by name."""
        import qwix  # it is there, where a QArray is

        latest = others.get("dy", x)
        beside = {name: others.pop(name) for name, _ in self.grid.beside}
        # The codes: what a table of values makes of them would be kept from pass to pass.
        codes = computed_after(kernel, latest)
        floats = qwix.dequantize(qwix.QArray(codes, **beside, qtype=self.grid.qtype))
        # And the floats: a compiler that adds an update to a product may round once where the
        # kernel is rounded first.
        kernel = computed_after(floats.astype(self.grid.dtype), latest)
        return self.of(x=x, kernel=kernel, **others)


def pass_of(kind: type[Forward] | type[Backward], spec: Spec) -> Callable[..., Arrays]:
    """The pass of a kind, with what the call has of dropout, updates and codes."""
    run: Callable[..., Arrays] = kind(spec)
    if spec.rates:
        run = Dropped(spec, kind)
    elif not spec.updated:
        run = Frozen(spec)
    return Dequantised(run, spec.grid) if spec.grid else run
