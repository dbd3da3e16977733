"""A frozen kernel as qwix holds it, codes and the scale of each tile of them, in one product.

It becomes floats in each pass anew, on each device from its own codes, and not before that pass has
reached the layer: then neither pass keeps a float kernel for the other, or for another layer.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from randlora_jax.ops.partitioning import Arrays
from randlora_jax.ops.products import Backward, Dropped, Forward, Frozen, computed_after
from randlora_jax.ops.spec import Grid, Spec
from randlora_jax.quantised import floats, is_quantised

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
    levels = _levels(kernel.qtype) if isinstance(kernel.qtype, str) else None
    return Grid(levels, beside, jnp.dtype(dtype)), {"kernel": kernel.qvalue, **arrays}


@functools.cache
def _levels(qtype: str) -> tuple[float, ...] | None:
    """What the codes of one of qwix's own types stand for, where that is not themselves."""
    import qwix  # it is there, where a QArray is

    with jax.ensure_compile_time_eval():
        one = qwix.quantize(jnp.ones((1, 1)), qtype)
        if one.qvalue.dtype != jnp.uint4:
            return None
        codes = jnp.arange(16).astype(jnp.uint4)
        array = dataclasses.replace(one, qvalue=codes[None], scale=jnp.ones((1, 1)))
        return tuple(qwix.dequantize(array)[0].tolist())


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
        floats = self._floats(computed_after(kernel, latest), **beside)
        # And the floats: a compiler that adds an update to a product may round once where the
        # kernel is rounded first.
        kernel = computed_after(floats.astype(self.grid.dtype), latest)
        return self.of(x=x, kernel=kernel, **others)

    def _floats(
        self, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None = None
    ) -> jax.Array:
        """What `qwix.dequantize` gives, to the last bit, without a constant array of its own."""
        if self.grid.levels:
            levels = jnp.stack([jnp.float32(level) for level in self.grid.levels])
            codes = levels[codes.astype(jnp.int32)]
        floats = codes.astype(scale.dtype)
        if zero_point is not None:
            floats = _by_tiles(operator.sub, floats, zero_point.astype(scale.dtype))
        return _by_tiles(operator.mul, floats, scale)


def _by_tiles(function: Callable[..., jax.Array], array: jax.Array, beside: jax.Array) -> jax.Array:
    """A function of an array's numbers and that of each one's tile."""
    pairs = [*zip(beside.shape, array.shape, strict=True)]
    tiles = (part for count, size in pairs for part in (count, size // count))
    each = (part for count, _ in pairs for part in (count, 1))
    return function(array.reshape(*tiles), beside.reshape(*each)).reshape(array.shape)


def rounded_floats(kernel: Any) -> Any:
    """A kernel's floats, those of a `qwix.QArray` rounded before anything is added to them."""
    if not is_quantised(kernel):
        return kernel
    return computed_after(floats(kernel), kernel.scale)


def pass_of(kind: type[Forward] | type[Backward], spec: Spec) -> Callable[..., Arrays]:
    """The pass of a kind, with what the call has of dropout, updates and codes."""
    run: Callable[..., Arrays] = kind(spec)
    if spec.rates:
        run = Dropped(spec, kind)
    elif not spec.updated:
        run = Frozen(spec)
    return Dequantised(run, spec.grid) if spec.grid else run
