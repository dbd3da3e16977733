"""Scales in a Linen model: beside their kernels inside, and in boxes as these are."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax import trees
from randlora_jax.adapters import named
from randlora_jax.config import RandLoraConfig
from randlora_jax.quantised import codes
from randlora_jax.sharding import along, spec_of
from randlora_jax.sites import LAMBDA, NUMBER, SCALES, Site, Stack, parse_label, scale_name
from randlora_jax.stacks import part_of_stack
from randlora_jax.stored import scale_pairs


def beside_kernels(
    variables: trees.Tree, active: Mapping[str, RandLoraConfig], *, numbered: bool = False
) -> dict[str, Any]:
    """Parameters with the active adapters' scales beside their kernels.

    There the model's own transforms carry them as they carry the kernels.

    Args:
      variables: with "params" and "randlora".
      active: the adapters, by name.
      numbered: whether each layer of a stack gets a number of its own, in the shape of its lambda.
    """
    params = variables.get("params", {})
    kernels, added = dict(trees.items(params)), {}
    for name, config in active.items():
        for path, pair in scale_pairs(named.scales_of(variables, name)):
            where, _ = parse_label(path, kernels)
            stack = Stack()
            if where in kernels:  # a method of a part of the model does with a part of the base
                stack = part_of_stack(config, where[:-1], trees.unboxed(kernels[where]).shape)
            for scale, leaf in zip(SCALES, pair, strict=True):
                spread = trees.replaced(leaf, stack.spread(trees.unboxed(leaf)))
                added[(*path, scale_name(scale, name))] = spread
                shape = trees.unboxed(spread).shape
                if numbered and scale == LAMBDA and len(shape) > 2:
                    numbers = _numbers(path, shape)
                    box = trees.replaced(spread, numbers)
                    added[(*path, scale_name(NUMBER, name))] = box
    return trees.union(params, trees.build(added))


def _numbers(path: trees.Path, shape: tuple[int, ...]) -> jax.Array:
    """Numbers for the layers of a stack, others than another stack's.

    They are of floating point, whole and exact, since a model may differentiate its parameters.
    """
    first = zlib.crc32("/".join(path).encode())
    numbers = (np.arange(math.prod(shape), dtype=np.uint64) * 0x9E3779B1 + first) % 2**24
    return jnp.asarray(numbers.astype(np.float32).reshape(shape))


def boxed(
    scales: Mapping[trees.Path, Any], sites: Iterable[Site], variables: trees.Tree
) -> dict[str, Any]:
    """A tree of scales, boxed and placed like their kernels where these are stacked."""
    leaves = dict(scales)
    for site in sites:
        box = codes(trees.get(variables["params"], site.kernel_path))
        kernel = trees.unboxed(box)
        for scale, axes in site.scale_axes(spec_of(kernel)).items():
            path = (*site.path, scale)
            leaves[path] = along(kernel, axes, leaves[path])
        if isinstance(box, nn.Partitioned):
            for scale, names in site.scale_axes(box.names).items():
                path = (*site.path, scale)
                leaves[path] = box.replace(value=leaves[path], names=names)
    return trees.build(leaves)
