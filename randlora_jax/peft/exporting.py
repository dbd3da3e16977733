"""From a Flax tree to PEFT's modules: names, rows of stacks, weights, and the config's words."""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np

from randlora_jax import targets, trees
from randlora_jax.bases import resized
from randlora_jax.config import RandLoraConfig
from randlora_jax.peft import config_json
from randlora_jax.peft.base_weights import tell_of_shared_embeddings
from randlora_jax.peft.names import NameOf, Names, inverse, kernel_at, leaf_of, to_torch
from randlora_jax.peft.tensors import BASES, Adapter
from randlora_jax.sites import Stack, parse_label
from randlora_jax.stacks import part_of_stack
from randlora_jax.stored import scale_pairs
from randlora_jax.training import split


def to_peft(
    variables: trees.Tree,
    config: RandLoraConfig,
    name_map: Names,
    stacks: Mapping[trees.Path, Stack] | None = None,
    shared_dims: Sequence[int] | None = None,
) -> Adapter:
    """What PEFT would save.

    Args:
      variables: with "randlora", "randlora_bases", and of "params" what was trained at least.
      stacks: by the path of scales; the first axes, where they aren't given.
      shared_dims: the sizes that PEFT gives the bases, if others.

    Raises:
      ValueError: for what has no name, or no form, in torch.
    """
    name_of = inverse(name_map)
    if name_of is None:
        raise ValueError(
            "name_map is a function, which can't be asked for the name of a place: give the "
            "mapping {name: name_map(name) for name in names}, with the torch model's "
            "named_modules() for names, or module_names(folder) of an adapter"
        )
    params = trees.items(variables.get("params", {}))
    shapes = {path: tuple(trees.unboxed(leaf).shape) for path, leaf in params}
    scales, adapted = {}, {}
    for path, pair in scale_pairs(variables["randlora"]):
        arrays = [np.asarray(trees.unboxed(leaf)) for leaf in pair]
        module, labelled = kernel_at(path, shapes)[1][:-1], parse_label(path, shapes)[1]
        # Of the layers of a stack, and of the experts within one: torch has a module for each.
        experts = (0,) * len(labelled.stacked) if labelled else ()
        outer = arrays[0].ndim - 2 - len(experts)
        axes = ((0,) * outer if stacks is None else stacks[path].axes) + experts
        if len(axes) > 1:
            raise ValueError(f"{trees.dotted(path)!r} is a stack of stacks, which has no PEFT name")
        layers: tuple[int | None, ...] = (None,)
        if axes:
            arrays = [np.moveaxis(array, axes[0], 0) for array in arrays]
            layers = part_of_stack(config, module, ()).layers or tuple(range(len(arrays[0])))
        for i, layer in enumerate(layers):
            name = _name(name_of, path, layer, shapes)
            lam, gamma = (_as_float(array[i] if axes else array) for array in arrays)
            scales[name] = lam, gamma
        adapted[module] = layers
    others = _others(variables, config, name_of, adapted, shapes)
    _check_head(config, others, config_json.names_of_kernels(shapes, name_of))
    config = config_json.in_torch(config, scales, others, shapes, name_of)
    bases = variables["randlora_bases"]
    if shared_dims is not None:
        bases = resized(config, bases, *shared_dims)
    return Adapter(config, scales, dense_bases(bases), others)


def dense_bases(bases: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The bases in float32; ternary ones as their sign times their size."""
    arrays = {name: np.asarray(bases[name]) for name in BASES}
    if "randlora_scale" in bases:
        sizes = np.asarray(bases["randlora_scale"], np.float32)
        arrays = {
            n: a.astype(np.float32) * s for (n, a), s in zip(arrays.items(), sizes, strict=True)
        }
    return {name: _as_float(array) for name, array in arrays.items()}


def _as_float(array: np.ndarray) -> np.ndarray:
    """In float32, to which narrower numbers are exact; float64 stays."""
    return array if array.dtype == np.float64 else array.astype(np.float32, copy=False)


def _name(
    name_of: NameOf, path: trees.Path, row: int | None, params: Container[trees.Path] = ()
) -> str:
    name = name_of(path, row)
    if name is None or (parse_label(path, params)[1] and name == ".".join(path)):
        layer = "" if row is None else f", layer {row}"
        raise ValueError(f"name_map has no module of PEFT's for {'.'.join(path)!r}{layer}")
    return name


def _check_head(config, others, names):
    """PEFT's classes for some tasks load the head of the model from the file, all of it."""
    heads = targets.HEADS.get(config.task_type or "", ())
    of_head = lambda name: any(part.endswith(heads) for part in name.split("."))
    saved = [module for module, leaf in others if leaf == "weight" and of_head(module)]
    missing = [name for name in names if of_head(name) and name not in saved]
    cure = "save with config.replace(task_type=None)"
    problem = (
        f"task_type={config.task_type!r}: PEFT's class for it wants the model's head, "
        f"{' or '.join(map(repr, heads))}, in the file"
    )
    if heads and missing:
        raise ValueError(f"{problem}: put {missing[0]!r} into modules_to_save, or {cure}")
    if heads and not saved:
        warnings.warn(f"{problem}, and there is none: if torch's has one, {cure}", stacklevel=4)


def _others(variables, config, name_of, adapted, shapes):
    """Biases and modules_to_save by (module, torch's name)."""
    found = {}
    trained = dict(trees.items(split(variables, config)[0].get("params", {})))
    tell_of_shared_embeddings(trained, shapes)
    for path, leaf in trained.items():
        value, module = np.asarray(trees.unboxed(leaf)), path[:-1]
        whole = targets.is_saved_whole(config, trees.dotted(module))
        rows: tuple[int | None, ...] = (None,)
        if name_of(module, None) is None and value.ndim:
            rows = tuple(range(value.shape[0]))
            if config.bias == "randlora_only" and not whole:
                rows = adapted[module]
        bias = trained.get((*module, "bias"))
        outputs = None if bias is None else trees.unboxed(bias).ndim - (rows != (None,))
        for row in rows:
            part = value if row is None else value[row]
            name = _name(name_of, module, row)
            part = to_torch(part, path, outputs, config.fan_in_fan_out)
            found[name, leaf_of(path)] = part
    return found
