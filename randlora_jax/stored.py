"""The sites of stored variables: which kernel each pair of scales belongs to, read from shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from randlora_jax import trees
from randlora_jax.bases import SCALING, check_rank, without_table
from randlora_jax.config import RandLoraConfig
from randlora_jax.equations import KernelAxes
from randlora_jax.ops.dot_general import check_fit
from randlora_jax.sites import GAMMA, LAMBDA, SCALES, Kernel, Shape, Site, Stack, parse_label
from randlora_jax.stacks import part_of_stack


def sites_of(
    variables: trees.Tree,
    config: RandLoraConfig,
    known: Mapping[trees.Path, Site] | None = None,
    *,
    guess: bool = False,
) -> list[Site]:
    """The sites of all scales in "randlora", each checked against its kernel and the bases.

    Args:
      variables: "params", "randlora" and, where there are, "randlora_bases"; shapes will do.
      config: one adapter's: its `r` and what it says of layers count.
      known: by path, where the model has been seen: its input axes, where the shapes don't tell.
      guess: take the likeliest reading where the shapes leave a choice.

    Raises:
      ValueError: naming the layer, where scales, bases and kernel don't fit, or leave a choice.
    """
    sites = []
    for path, found in _all_readings(variables, config):
        kernel_path = found[0].kernel_path
        if known is not None and path in known:
            features = known[path].kernel.features
            found = [site for site in found if site.kernel.features == features]
        if len(found) != 1 and not (guess and found):
            choices = sorted(site.kernel.features for site in found)
            shape = tuple(trees.unboxed(trees.get(variables["params"], kernel_path)).shape)
            raise ValueError(
                f"{trees.shown(path)}: a kernel of {shape} can be any of {choices} (in, out): give "
                "the model's example inputs too, as in merge(variables, x)"
            )
        sites.append(found[0])
    return sites


def possible_features(variables: trees.Tree, config: RandLoraConfig) -> list[tuple[int, int]]:
    """(in, out) of all kernels, each in all ways that its shapes allow.

    For what must serve them all: sizes that do are those of the model too, where it has layers of
    either kind.
    """
    return [s.kernel.features for _, found in _all_readings(variables, config) for s in found]


def _all_readings(
    variables: trees.Tree, config: RandLoraConfig
) -> Iterator[tuple[trees.Path, list[Site]]]:
    """For each pair of scales, all ways to read its kernel, each checked against the bases.

    Raises:
      ValueError: naming the layer, where scales, bases and kernel don't fit.
    """
    params, bases = dict(trees.items(variables["params"])), variables.get("randlora_bases")
    if capacity := slots_of(variables):
        raise ValueError(
            f"'randlora' holds a table of {capacity[0]} adapters: rl.adapters.select(variables, "
            "table, name) takes one out"
        )
    for path, scales in scale_pairs(variables["randlora"]):
        where, labelled = parse_label(path, params)
        if where not in params:
            raise ValueError(
                f"{trees.shown(path)} has scales in 'randlora' but no kernel in 'params': the "
                "adapter is of another model"
            )
        shapes = [tuple(trees.unboxed(leaf).shape) for leaf in (params[where], *scales)]
        try:
            if bases is not None:
                check_rank(config, bases)
            found = _readings(where, labelled, trees.unboxed(params[where]).dtype, shapes, config)
            for kernel in (site.kernel for site in found):
                if bases is not None:
                    check_fit(bases, kernel.features, kernel.scale_shapes(config.r))
        except ValueError as error:
            raise ValueError(f"{trees.shown(path)}: {error}") from None
        yield path, found


def slots_of(variables: trees.Tree) -> tuple[int, ...]:
    """(capacity,) of scales that are a table's, else ()."""
    scaling = variables.get("randlora_bases", {}).get(SCALING)
    return () if scaling is None else scaling.shape


def of_one_slot(variables: trees.Tree, config: RandLoraConfig) -> dict[str, Any]:
    """A table's variables as if one adapter were in them: the shapes of its scales.

    Raises:
      ValueError: naming the layer, where nothing fits.
    """
    bases = without_table(variables["randlora_bases"])
    capacity = slots_of(variables)
    leaves: dict[trees.Path, Any] = {}
    for path, pair in scale_pairs(variables["randlora"]):
        arrays = [trees.unboxed(leaf) for leaf in pair]
        for axis in range(arrays[0].ndim - 2):
            less = lambda shape, axis=axis: (*shape[:axis], *shape[axis + 1 :])
            one = {
                (*path, scale): jax.ShapeDtypeStruct(less(array.shape), array.dtype)
                for scale, array in zip(SCALES, arrays, strict=True)
            }
            given = {**variables, "randlora": trees.build(one), "randlora_bases": bases}
            try:
                (site,) = sites_of(given, config, guess=True)
            except ValueError:
                continue
            if site.stored_scales(config.r, capacity)[(*path, LAMBDA)].shape == arrays[0].shape:
                leaves |= one
                break
        else:
            raise ValueError(
                f"{trees.shown(path)}: scales of {arrays[0].shape} are none of a table of "
                f"{capacity} for its kernel"
            )
    return {**variables, "randlora": trees.build(leaves), "randlora_bases": bases}


def scale_pairs(scales: trees.Tree) -> Iterator[tuple[trees.Path, tuple[Any, Any]]]:
    """(path, (lambda, gamma)) of each pair in a tree of scales.

    Raises:
      ValueError: if one of the two is missing.
    """
    leaves = dict(trees.items(scales))
    for path in sorted({path[:-1] for path in leaves}):
        for scale in SCALES:
            if (*path, scale) not in leaves:
                raise ValueError(f"the scales lack {trees.dotted((*path, scale))!r}")
        yield path, (leaves[(*path, LAMBDA)], leaves[(*path, GAMMA)])


def stack_axes(stored: Shape, layer: Shape, *others: tuple[Shape, Shape]) -> tuple[int, ...]:
    """The axes that a stored array has besides one layer's, outermost first.

    Args:
      stored, layer: its shape, and that of one layer's.
      *others: the same of arrays that are stacked with it.

    Raises:
      ValueError: if there is no way to read it so.
    """
    whole, layers = zip((tuple(stored), tuple(layer)), *others, strict=True)
    for axes in _axes_of_stacks(len(stored) - len(layer), len(stored)):
        split = _split_all(whole, axes)
        if split is not None and split[0] == list(layers):
            return axes
    raise ValueError(f"its kernel has the shape {tuple(stored)}, but it was made for {layer}")


def _readings(
    where: trees.Path,
    labelled: KernelAxes | None,
    dtype: Any,
    shapes: Sequence[Shape],
    config: RandLoraConfig,
) -> list[Site]:
    """All ways to read a stored kernel that fit its scales' shapes, the likeliest first.

    They differ in (in, out): what reads the same is listed once.
    """
    shape, lam, gamma = shapes
    layers = part_of_stack(config, where[:-1], shape).layers
    if layers and layers[-1] < shape[0]:
        shape = (len(layers), *shape[1:])
    else:
        layers = None
    found: dict[tuple[int, int], Site] = {}
    within = len(labelled.stacked) if labelled else 0
    for axes in _axes_of_stacks(len(lam) - 2 - within, len(shape)):
        if found:
            break  # the sizes seldom allow another
        split = _split_all((shape, lam, gamma), axes)
        if split is None:
            continue
        layer, *of_scales = split[0]
        stack = Stack(axes, Stack(axes).split(shapes[0])[1], layers)
        guessed = (KernelAxes((), tuple(range(i))) for i in range(1, len(layer)))
        for stacked, inputs in [labelled] if labelled else guessed:
            if max((*stacked, *inputs)) >= len(layer):
                continue
            kernel = Kernel(layer, inputs, where[-1], dtype, stacked)
            if [*kernel.scale_shapes(of_scales[0][-2])] == of_scales:
                found.setdefault(kernel.features, Site(where[:-1], kernel, stack))
    if not found:
        raise ValueError(
            f"scales of shapes {lam} and {gamma} don't fit a kernel of {shape}: they are of "
            "another model or another r"
        )
    return list(found.values())


def _axes_of_stacks(count: int, ndim: int) -> Iterator[tuple[int, ...]]:
    """The axes that a stack of `count` axes can have: nearly always the first, else the last."""
    usual = (0, 1, -1)
    yield from itertools.product(usual, repeat=max(count, 0))
    yield from itertools.product((*usual, *range(2, ndim)), repeat=max(count, 0))


def _split_all(
    shapes: Sequence[Shape], axes: tuple[int, ...]
) -> tuple[list[Shape], tuple[int, ...]] | None:
    """(one layer's shapes, the stack's sizes), None if these axes are not those of one stack."""
    try:
        layers, sizes = zip(*(Stack(axes).split(shape) for shape in shapes), strict=True)
    except IndexError:
        return None
    return (list(layers), sizes[0]) if len(set(sizes)) == 1 else None
