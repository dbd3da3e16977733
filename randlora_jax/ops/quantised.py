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
from randlora_jax.ops.products import computed_after
from randlora_jax.ops.spec import Grid
from randlora_jax.placement import automatic
from randlora_jax.quantised import dequantised, floats, is_quantised, levels_of

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
                if value.shape[axis] < kernel.shape[axis]:
                    value = jnp.repeat(value, kernel.shape[axis] // value.shape[axis], axis)
            arrays[name] = value
    beside = tuple((name, value.shape[stacked:]) for name, value in arrays.items())
    grid = Grid(levels_of(kernel), beside, jnp.dtype(dtype))
    return grid, {"kernel": kernel.qvalue, **arrays}


@dataclasses.dataclass(frozen=True)
class Dequantised:
    """A pass over codes: one over floats, which are made of them here."""

    of: Callable[..., Arrays]
    grid: Grid

    def __call__(self, x: jax.Array, kernel: jax.Array, **others: jax.Array) -> Arrays:
        """The results, of operands by name."""
        latest = others.get("dy", x)
        beside = {name: others.pop(name) for name, _ in self.grid.beside}
        # The codes: what a table of levels makes of them would be kept from pass to pass.
        floats = dequantised(computed_after(kernel, latest), levels=self.grid.levels, **beside)
        # And the floats: a compiler that adds an update to a product may round once where the
        # kernel is rounded first.
        kernel = computed_after(floats.astype(self.grid.dtype), latest)
        return self.of(x=x, kernel=kernel, **others)


def rounded_floats(kernel: Any) -> Any:
    """A kernel's floats, those of a `qwix.QArray` rounded before anything is added to them."""
    if not is_quantised(kernel):
        return kernel
    rounded = lambda kernel: computed_after(floats(kernel), kernel.scale)
    return automatic(rounded, kernel.qvalue)(kernel)
