"""From PEFT's modules to a Flax tree: places, stacks, bases, and the config's words."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax import bases as bases_lib
from randlora_jax import kernels, merging, targets, trees
from randlora_jax.config import RandLoraConfig
from randlora_jax.peft import configs, torch_bases
from randlora_jax.peft.files import Adapter
from randlora_jax.peft.torch_names import (
    Names,
    Shapes,
    from_torch,
    kernel_at,
    leaf_at,
    place,
)
from randlora_jax.training import FROZEN, labels


def onto(
    adapter: Adapter, variables: trees.Tree, name_map: Names
) -> tuple[dict[str, Any], RandLoraConfig]:
    """Puts an adapter on a base and checks that it fits, as `peft.load_adapter` says."""
    shapes = {p: tuple(nn.unbox(leaf).shape) for p, leaf in trees.items(variables["params"])}
    added, config, found = from_peft(adapter, name_map, shapes)
    whole = {**variables, **added}
    for _ in merging.adapted(whole, config, ambiguous=True):
        pass  # each is checked as it is found
    if adapter.others or config.bias != "none" or config.modules_to_save:
        whole, config = _with_others(adapter, whole, config, found, shapes, name_map)
    return whole, config


@dataclasses.dataclass(frozen=True)
class Placed:
    """The scales of one kernel of a Flax tree.

    Attributes:
      where: the kernel's path.
      axes: its input axes, where the map says them.
      rows: the layers of a stack that have scales; None for a kernel in no stack.
      length: how many layers the stack has.
      scales: (lambda, gamma), stacked on a first axis where the kernel is.
    """

    where: trees.Path
    axes: tuple[int, ...] | None
    rows: tuple[int, ...] | None
    length: int
    scales: tuple[np.ndarray, np.ndarray]


def placed(adapter: Adapter, name_map: Names, shapes: Shapes | None) -> dict[trees.Path, Placed]:
    """An adapter's scales by their path in a Flax tree; `shapes` are of the base, where known."""
    found: dict[trees.Path, dict[int | None, str]] = {}
    kernel = {}
    for name in adapter.scales:
        path, index = place(name_map, name)
        path, *kernel[path] = kernel_at(path)
        other = found.setdefault(path, {}).setdefault(index, name)
        if other != name or (len(found[path]) > 1 and None in found[path]):
            names = sorted({*found[path].values(), name})
            raise ValueError(f"name_map gives one place, {'.'.join(path)!r}, for {names}")
    result = {}
    for path, names in found.items():
        where, axes = kernel[path]
        if shapes is not None and where not in shapes:
            beside = sorted(".".join(p) for p in shapes if p[:-1] == where[:-1])
            raise ValueError(
                f"it has scales for {next(iter(names.values()))!r}, but the base has no "
                f"{'.'.join(where)!r}" + (f", only {beside}" if beside else "")
            )
        if None in names:
            result[path] = Placed(where, axes, None, 1, adapter.scales[names[None]])
            continue
        rows = tuple(sorted(names))
        length = rows[-1] + 1 if shapes is None else shapes[where][0]
        if rows[-1] >= length:
            raise ValueError(
                f"it has scales for {names[rows[-1]]!r}, but {'.'.join(where)!r} is a stack of "
                f"{length} layers"
            )
        pairs = [adapter.scales[names[i]] for i in rows]
        if len({tuple(a.shape for a in pair) for pair in pairs}) > 1:
            raise ValueError(f"the scales of {sorted(names.values())} differ in shape")
        stacked = tuple(np.stack(arrays) for arrays in zip(*pairs, strict=True))
        result[path] = Placed(where, axes, rows, length, stacked)
    return result


def from_peft(adapter: Adapter, name_map: Names, shapes: Shapes | None):
    """(variables without params, config, what was placed) of an adapter that has its bases."""
    found = placed(adapter, name_map, shapes)
    if shapes is not None:
        configs.check_complete(adapter.config, adapter.scales, found, shapes, name_map)
    config = configs.in_flax(adapter.config, found, shapes or {})
    bases = adapter.bases
    if bases is None:
        if shapes is None:
            raise ValueError(
                "it has no bases, and without the base nothing tells how large they are: load it "
                "in Python, onto the base"
            )
        bases = _redrawn(config, found, shapes)
    config = config.replace(save_projection=True)
    scales = {}
    for path, one in found.items():
        for label, array in zip(kernels.SCALES, one.scales, strict=True):
            scales[(*path, label)] = _to_jax(array)
    bases = {name: _to_jax(array) for name, array in compact(bases, config).items()}
    return {"randlora": trees.build(scales), "randlora_bases": bases}, config, found


def _redrawn(config, found, shapes):
    sides = []
    for one in found.values():
        shape = shapes[one.where] if one.rows is None else (len(one.rows), *shapes[one.where][1:])
        sizes = [array.shape for array in one.scales]
        fits = kernels.layouts(shape, *sizes, one.axes, one.where[-1])
        sides.append(kernels.only(fits, shape).kernel.sides)
    warnings.warn(
        "the file has a seed in place of its bases and does not say which torch drew them: they "
        "are drawn as torch >= 2.12 does, and torch <= 2.11 draws others unless sparse. If outputs "
        "are not PEFT's, save it again where it was trained, with save_projection=True",
        stacklevel=5,
    )
    return torch_bases.draw(config, *bases_lib.shared_dims(sides))


def compact(bases: dict[str, np.ndarray], config: RandLoraConfig) -> dict[str, np.ndarray]:
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


def _to_jax(array: np.ndarray) -> jax.Array:
    if array.dtype == np.float64 and not jax.config.jax_enable_x64:
        raise ValueError("it has float64 numbers: set jax_enable_x64 to read them as they are")
    return jnp.asarray(array)


def _with_others(adapter, whole, config, found, shapes, name_map):
    """Puts biases and `modules_to_save` in the base's place."""
    params = dict(trees.items(whole["params"]))
    new: dict[trees.Path, np.ndarray] = {}
    rows: dict[trees.Path, set[int]] = {}
    saved = set()
    for (module, leaf), value in adapter.others.items():
        path, index = place(name_map, module)
        at, kernel, _ = kernel_at(path)
        path = kernel[:-1]
        if leaf == "weight" and at != path:
            raise ValueError(
                f"it has {module + '.weight'!r}, which has no place in {'.'.join(at)!r}: only "
                "kernels that are called so and have their inputs first can be in modules_to_save"
            )
        where = leaf_at(path, leaf, shapes)
        if where not in shapes or (index is not None and index >= shapes[where][0]):
            raise ValueError(f"it has {module + '.' + leaf!r}, but the base no {'.'.join(where)!r}")
        shape = shapes[where] if index is None else shapes[where][1:]
        value = from_torch(value, where, shape, config.fan_in_fan_out)
        old = nn.unbox(params[where])
        dtype = np.promote_types(old.dtype, value.dtype)  # so that neither is rounded
        if index is None:
            new[where] = value.astype(dtype)
        else:
            if where not in new:
                new[where] = np.array(old).astype(dtype)
            new[where][index] = value
        rows.setdefault(where, set()).add(index)
        if targets.is_saved_whole(adapter.config, module):
            saved.add(targets.name_of(path))
    if not all(targets.is_saved_whole(config, name) for name in saved):
        config = config.replace(modules_to_save=sorted(saved))
    for path, label in trees.items(labels(whole, config)["params"]):
        one = found.get(path[:-1])
        wanted = {None}
        if path in rows and None not in rows[path]:
            part = label == "bias" and config.bias == "randlora_only" and one is not None
            wanted = set(one.rows if part and one.rows else range(shapes[path][0]))
        if label != FROZEN and rows.get(path) != wanted:
            raise ValueError(f"it lacks all or part of {'.'.join(path)!r}, which its config trains")
    for path, value in new.items():
        array = _to_jax(value)
        sharding = getattr(nn.unbox(params[path]), "sharding", None)
        array = array if sharding is None else jax.device_put(array, sharding)
        params[path] = nn.meta.replace_boxed(params[path], array)
    return {**whole, "params": trees.build(params)}, config
