"""Quantising kernels with qwix, and what a merged kernel loses where it is quantised again."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding

from randlora_jax import trees
from randlora_jax.placement import has_values
from randlora_jax.quantised import floats, is_quantised, type_of
from randlora_jax.sharding import padded, placed
from randlora_jax.sites import Site, Stack


@dataclasses.dataclass(frozen=True)
class How:
    """How kernels are quantised, as a rule of qwix says it.

    Attributes:
      qtype: "int8", "int4", "nf4", a dtype, or whatever else qwix knows.
      tile_size: how many numbers along the last input axis share a scale; None is all. Along other
        inputs all share one, and each output has its own, and each matrix of a stack.
    """

    qtype: Any
    tile_size: int | None = None

    def __post_init__(self) -> None:
        size = self.tile_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"tile_size must be a number of inputs, as 64, or None, got {size!r}")
        try:
            one = jax.ShapeDtypeStruct((size or 1, 1), jnp.float32)
            jax.eval_shape(_Quantise(self.qtype, (1,), ((0, size),) if size else ()), one)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"qtype={self.qtype!r} is no type that qwix quantises to ({error}): give 'int8', "
                "'int4' or 'nf4'"
            ) from None

    def check(self, site: Site) -> None:
        """Raises a ValueError for a kernel that can't be cut into tiles."""
        size = site.kernel.shape[site.kernel.input_axes[-1]]
        if self.tile_size and size % self.tile_size:
            raise ValueError(
                f"tile_size={self.tile_size} does not divide the {size} inputs of "
                f"{trees.dotted(site.kernel_path)!r}: give one that does, or the layer's name to "
                "exclude_modules"
            )


def quantise_sites(
    params: Mapping[trees.Path, Any], sites: Iterable[Site], how: How, *, donate: bool = False
) -> Iterator[tuple[trees.Path, Any]]:
    """The kernels of sites by path, quantised one after the other, in the boxes that they were in.

    Args:
      params: leaves by path, of which those that are quantised already are left out.
      donate: delete each array when its codes are there.

    Raises:
      ValueError: for tiles that don't divide a kernel's inputs, before the first is quantised.
    """
    kernels = {site.kernel_path: site for site in sites}
    kernels = {p: site for p, site in kernels.items() if not is_quantised(params[p])}
    for site in kernels.values():
        how.check(site)
    for path, site in kernels.items():
        value = trees.unboxed(params[path])
        new = _quantised(value, site, how)
        if donate and isinstance(value, jax.Array) and has_values(value):
            jax.block_until_ready(new)
            value.delete()
        yield path, trees.replaced(params[path], new)


def _quantised(value: Any, site: Site, how: How) -> Any:
    """One kernel, where it is and divided as it is; of an abstract one, the shapes."""
    kernel, tile = site.kernel, how.tile_size
    by_channel = tuple(i for i in range(len(kernel.shape)) if i not in kernel.input_axes)
    tiles = ((kernel.input_axes[-1], tile),) if tile else ()
    function = _Quantise(how.qtype, by_channel, tiles)
    untyped = jax.ShapeDtypeStruct(value.shape, value.dtype)
    shapes = jax.eval_shape(site.stack.over(function), untyped)
    own = None if isinstance(value, Tracer) else getattr(value, "sharding", None)
    where = placed(shapes, own.spec, own.mesh) if isinstance(own, NamedSharding) else None
    if not isinstance(value, jax.ShapeDtypeStruct):
        return _quantiser(function, site.stack, where)(value)
    struct = lambda part, sharding=None: jax.ShapeDtypeStruct(
        part.shape, part.dtype, sharding=sharding
    )
    return shapes if where is None else jax.tree.map(struct, shapes, where)


@functools.lru_cache(maxsize=256)  # kernels of one shape share what is compiled
def _quantiser(function: _Quantise, stack: Stack, where: Any) -> Any:
    return jax.jit(_divided(stack.over(function), where), out_shardings=where)


def _divided(function: Callable[..., Any], where: Any, *given: Any) -> Callable[..., Any]:
    """A function that quantises its last argument, whose part each device quantises by itself.

    A search of nf4's levels over all of the numbers would gather them. Where a tile is cut by the
    division, the compiler has to.

    Args:
      where: the shardings of the result, a QArray of them; None if they are on no mesh.
      given: those of the arguments before the last.
    """
    if where is None or not isinstance(where.qvalue, NamedSharding):
        return function
    codes, specs = where.qvalue, jax.tree.map(lambda sharding: sharding.spec, (*given, where))
    if padded(codes.spec, len(where.scale.spec)) == tuple(where.scale.spec):
        in_specs, out_specs = (*specs[:-1], codes.spec), specs[-1]
        return jax.shard_map(function, mesh=codes.mesh, in_specs=in_specs, out_specs=out_specs)
    if AxisType.Explicit in codes.mesh.axis_types:
        return jax.sharding.auto_axes(function, out_sharding=where)
    return function


@dataclasses.dataclass(frozen=True)
class _Quantise:
    """A function of one layer's kernel."""

    qtype: Any
    by_channel: tuple[int, ...]
    tiles: tuple[tuple[int, int], ...]

    def __call__(self, value: jax.Array) -> Any:
        channels, tiles = self.by_channel, dict(self.tiles)
        return _qwix().quantize(value, self.qtype, channelwise_axes=channels, tiled_axes=tiles)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise ImportError(
            "quantised kernels are qwix's: pip install 'randlora_jax[quantised]'"
        ) from None
    return qwix


@dataclasses.dataclass(frozen=True)
class Loss:
    """Of one kernel: the norms of its update, and of what rounding made of the merged one."""

    update: Any
    error: Any
    type: str

    @property
    def part(self) -> float:
        """The error as a part of the update; 1 where there is no update, which is all lost."""
        return float(self.error) / float(self.update) if self.update else 1.0


def quantised_like(leaf: Any, value: jax.Array) -> Any:
    """Other values, quantised as a QArray is: to its type, in its tiles, of its scales' dtype."""
    sizes = enumerate(zip(leaf.shape, leaf.scale.shape, strict=True))
    tiles = {i: n // count for i, (n, count) in sizes if count > 1}
    method = "absmax" if leaf.zero_point is None else "minmax"
    value = value.astype(leaf.dtype)
    return _qwix().quantize(value, leaf.qtype, tiled_axes=tiles, calibration_method=method)


def requantised(old: Any, merged: jax.Array) -> tuple[Any, Loss]:
    """Merged floats, quantised as the old kernel was, and what that has cost."""
    traced = isinstance(merged, Tracer)
    where = None if traced else jax.tree.map(lambda part: part.sharding, old)
    new, update, error = _requantiser(jax.tree.structure(old), where)(old, merged)
    return new, Loss(update, error, type_of(old))


@functools.lru_cache(maxsize=256)
def _requantiser(structure: Any, where: Any) -> Any:
    quantise = _divided(quantised_like, where, *([] if where is None else [where]))
    wide = lambda array: floats(array).astype(jnp.float32)
    norm = lambda a, b: jnp.sqrt(jnp.sum(jnp.square(wide(a) - wide(b))))

    def run(old, merged):
        new = quantise(old, merged)
        return new, norm(merged, old), norm(new, merged)

    return jax.jit(run, out_shardings=None if where is None else (where, None, None))


def tell_of_losses(losses: Mapping[str, Loss], stacklevel: int) -> None:
    """Warns of what all kernels have lost; of nothing under `jit`, which has no values."""
    known = {n: loss for n, loss in losses.items() if not isinstance(loss.update, Tracer)}
    if not known:
        return
    parts = {name: loss.part for name, loss in known.items()}
    worst = max(parts, key=lambda name: parts[name])
    drowned = sum(part >= 1 for part in parts.values())
    text = (
        f"merged kernels were rounded to {known[worst].type} again: the error is "
        f"{statistics.median(parts.values()):.0%} of the update at the median kernel, and "
        f"{parts[worst]:.0%} at the worst, {worst!r}"
    )
    if drowned:
        text += (
            f". In {drowned} of {len(parts)} kernels the update is smaller than the grid, and "
            "mostly lost: merge without requantize, or keep the adapter beside the base"
        )
    warnings.warn(text, stacklevel=stacklevel)
