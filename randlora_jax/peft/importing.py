"""From PEFT's modules to a Flax tree: places, stacks, bases, and the config's words."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax import bases as bases_lib
from randlora_jax import trees
from randlora_jax.config import RandLoraConfig
from randlora_jax.peft import config_json, torch_bases
from randlora_jax.peft.base_weights import to_jax, with_weights
from randlora_jax.peft.names import Names, Shapes, kernel_at, of_inner, place_of
from randlora_jax.peft.tensors import Adapter
from randlora_jax.quantised import is_quantised
from randlora_jax.sites import SCALES, Stack
from randlora_jax.stored import sites_of


def onto_base(
    adapter: Adapter, variables: trees.Tree, name_map: Names
) -> tuple[dict[str, Any], RandLoraConfig]:
    """Puts an adapter on a base and checks that it fits, as `peft.load_adapter` says."""
    shapes = {p: tuple(trees.unboxed(leaf).shape) for p, leaf in trees.items(variables["params"])}
    added, config, stacks = from_peft(adapter, name_map, shapes)
    loaded = {**variables, **added}
    sites = sites_of(loaded, config, guess=True)
    if adapter.bases is None:
        kernels = (trees.get(variables["params"], site.kernel_path) for site in sites)
        dtypes = {np.dtype(trees.unboxed(k).dtype) for k in kernels if not is_quantised(k)}
        loaded["randlora_bases"] = _beside(loaded["randlora_bases"], dtypes)
    weights = adapter.others or adapter.of_base
    if weights or config.bias != "none" or config.modules_to_save:
        return with_weights(adapter, loaded, config, stacks, shapes, name_map)
    return loaded, config


def from_peft(
    adapter: Adapter, name_map: Names, shapes: Shapes | None
) -> tuple[dict[str, Any], RandLoraConfig, dict[trees.Path, Stack]]:
    """(variables without params, config, each kernel's stack) of an adapter.

    Args:
      shapes: of the base's parameters; None without a base, which only an adapter with its bases
        can do without.
    """
    scales, stacks = _scales(adapter, name_map, shapes)
    if shapes is not None:
        config_json.check_complete(adapter.config, adapter.scales, stacks, shapes, name_map)
    config = config_json.in_flax(adapter.config, stacks, shapes or {})
    bases = adapter.bases
    if bases is None:
        if shapes is None:
            raise ValueError(
                "it has no bases, and without the base nothing tells how large they are: load it "
                "in Python, onto the base"
            )
        bases = _redrawn(config, scales, shapes)
    config = config.replace(save_projection=True)
    arrays = {path: to_jax(array) for path, array in scales.items()}
    pair = {name: to_jax(array) for name, array in compact_bases(bases, config).items()}
    return {"randlora": trees.build(arrays), "randlora_bases": pair}, config, stacks


def _scales(
    adapter: Adapter, name_map: Names, shapes: Shapes | None
) -> tuple[dict[trees.Path, np.ndarray], dict[trees.Path, Stack]]:
    """An adapter's scales in a Flax tree, by their path, and each pair's stack of layers."""
    named: dict[trees.Path, dict[int | None, str]] = {}
    kernels: dict[trees.Path, trees.Path] = {}
    for name in adapter.scales:
        path, index = place_of(name_map, name)
        path, kernels[path] = kernel_at(path, shapes or ())
        other = named.setdefault(path, {}).setdefault(index, name)
        if other != name or (len(named[path]) > 1 and None in named[path]):
            names = sorted({*named[path].values(), name})
            raise ValueError(f"name_map gives one place, {trees.dotted(path)!r}, for {names}")
    scales: dict[trees.Path, np.ndarray] = {}
    stacks: dict[trees.Path, Stack] = {}
    for path, by_layer in named.items():
        stacks[path] = _stack(by_layer, kernels[path], shapes)
        # None, of a kernel in no stack, stands alone; numbers are of one kind.
        pairs = [adapter.scales[by_layer[i]] for i in sorted(by_layer, key=lambda i: i or 0)]
        if len({tuple(a.shape for a in pair) for pair in pairs}) > 1:
            raise ValueError(f"the scales of {sorted(by_layer.values())} differ in shape")
        for scale, arrays in zip(SCALES, zip(*pairs, strict=True), strict=True):
            scales[(*path, scale)] = np.stack(arrays) if stacks[path].axes else arrays[0]
    return scales, stacks


def _stack(by_layer: Mapping[int | None, str], kernel: trees.Path, shapes: Shapes | None) -> Stack:
    """The stack of a kernel for which there are modules by their number, None if in no stack."""
    if shapes is not None and kernel not in shapes:
        name = next(iter(by_layer.values()))
        beside = sorted(trees.dotted(p) for p in shapes if p[:-1] == kernel[:-1])
        raise ValueError(
            f"it has scales for {name!r}, but the base has no {trees.dotted(kernel)!r}"
            + (f", only {beside}" if beside else "")
            + of_inner(name)
        )
    layers = tuple(sorted(i for i in by_layer if i is not None))
    if not layers:
        return Stack()
    size = layers[-1] + 1 if shapes is None else shapes[kernel][0]
    if layers[-1] >= size:
        raise ValueError(
            f"it has scales for {by_layer[layers[-1]]!r}, but {trees.dotted(kernel)!r} is a stack "
            f"of {size} layers"
        )
    return Stack((0,), (size,), layers)


def _redrawn(
    config: RandLoraConfig, scales: Mapping[trees.Path, np.ndarray], shapes: Shapes
) -> dict[str, np.ndarray]:
    """The bases that torch draws for the kernels that have scales."""
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    tree = {"params": trees.build(params), "randlora": trees.build(scales)}
    features = [site.kernel.features for site in sites_of(tree, config)]
    warnings.warn(
        "the file has a seed in place of its bases and does not say which torch drew them: they "
        "are drawn as torch >= 2.12 does, and torch <= 2.11 draws others unless sparse. If outputs "
        "are not PEFT's, save it again where it was trained, with save_projection=True",
        stacklevel=5,
    )
    return torch_bases.draw(config, *bases_lib.shared_dims(features))


def _beside(bases: Mapping[str, Any], dtypes: Collection[np.dtype]) -> dict[str, Any]:
    """Drawn bases as they are beside kernels of these dtypes: each rounds the one pair in PEFT."""
    found = dict(bases)
    for dtype in dtypes:
        if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
            is_sign = lambda array: jnp.issubdtype(array.dtype, jnp.integer)
            rounded = lambda array, dtype=dtype: array.astype(dtype).astype(array.dtype)
            found = {name: a if is_sign(a) else rounded(a) for name, a in found.items()}
    return found


def compact_bases(bases: dict[str, np.ndarray], config: RandLoraConfig) -> dict[str, np.ndarray]:
    """Ternary bases as int8 signs and two sizes, if every bit can be had back from them."""
    if not (config.sparse or config.very_sparse):
        return bases
    signs, sizes = {}, []
    for name, array in bases.items():
        size = np.abs(array).max(initial=0)
        if array.dtype != np.float32 or not np.isfinite(size) or not size:
            return bases
        signs[name] = np.sign(array).astype(np.int8)
        again = signs[name].astype(np.float32) * size
        if (again.view(np.uint32) != array.view(np.uint32)).any():
            return bases
        sizes.append(size)
    return signs | {"randlora_scale": np.array(sizes, np.float32)}
