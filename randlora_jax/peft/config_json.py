"""The config's words on both sides: PEFT's JSON, and targets by torch's or by Flax's names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from etils import epath

from randlora_jax import targets, trees
from randlora_jax.config import ALL_LINEAR, RandLoraConfig
from randlora_jax.peft.names import NameOf, Names, Shapes, inverse, kernel_at, place_of
from randlora_jax.sites import Stack
from randlora_jax.targets import Selection


def read_config(path: epath.Path) -> RandLoraConfig:
    """Reads `adapter_config.json`.

    Raises:
      ValueError: if it is no JSON, of another method, or holds what can't work.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, got a {type(values).__name__}")
    # What PEFT accepts and takes no notice of, and what it decides where two are set.
    ignored: dict[str, Any] = {}
    target, layers = values.get("target_modules"), values.get("layers_to_transform")
    regex = isinstance(target, str) and target.lower() != ALL_LINEAR
    if layers is not None and (layers == [] or regex):
        ignored["layers_to_transform"] = layers = None
    if layers is None and values.get("layers_pattern") is not None:
        ignored["layers_pattern"] = None
    if values.get("sparse") and values.get("very_sparse"):
        ignored["sparse"] = False
    if str(values.get("bias")).endswith("_only"):  # "lora_only" among them: all one to PEFT
        values = values | {"bias": "randlora_only"}
    if ignored:
        warnings.warn(f"{path}: PEFT takes no notice of {sorted(ignored)} here", stacklevel=7)
    try:
        return RandLoraConfig.from_dict(values | ignored)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def content(config: RandLoraConfig) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    result = config.to_dict()
    if not -(2**63) <= config.projection_prng_key < 2**64:  # what torch takes for a seed
        result["projection_prng_key"] &= 0xFFFFFFFF
    return result


def check_complete(
    config: RandLoraConfig,
    given: Collection[str],
    stacks: Mapping[trees.Path, Stack],
    shapes: Shapes,
    name_map: Names,
) -> None:
    """Raises a ValueError for a module that the config means and that is not among those given."""
    for name in _candidates(given, stacks, shapes, name_map):
        if name in given or not targets.peft_matches(config, name):
            continue
        try:
            path, index = place_of(name_map, name)
        except ValueError:
            continue
        where = kernel_at(path, shapes)[1]
        if where in shapes and (index is None or index < shapes[where][0]):
            raise ValueError(f"it lacks the scales of {name!r}, one of its config's targets")


def _candidates(given, stacks, shapes, name_map) -> Iterator[str]:
    """Names of modules that could be targets: of all kernels, or those like the given ones."""
    back = inverse(name_map)
    if back is not None:
        yield from names_of_kernels(shapes, back)
        return
    # A function has no way back: the same names with another layer's number.
    seen = [int(part) for name in given for part in name.split(".") if part.isdigit()]
    sizes = (size for stack in stacks.values() for size in stack.sizes)
    numbers = range(max([*seen, *(size - 1 for size in sizes)], default=0) + 2)
    for name in given:
        parts = name.split(".")
        for i, part in enumerate(parts):
            for number in numbers if part.isdigit() else ():
                yield ".".join((*parts[:i], str(number), *parts[i + 1 :]))


def names_of_kernels(shapes: Shapes, name_of: NameOf) -> Iterator[str]:
    """Torch's names of the modules of all kernels, a stack's one by one."""
    for where, shape in shapes.items():
        if where[-1] == "kernel":
            indices = (None, *range(shape[0] if len(shape) > 2 else 0))
            yield from filter(None, (name_of(where[:-1], index) for index in indices))


def in_flax(
    config: RandLoraConfig, stacks: Mapping[trees.Path, Stack], shapes: Shapes
) -> RandLoraConfig:
    """The config, in Flax's names if in those it would mean other modules.

    Args:
      stacks: of the kernels that have scales, by the path of these.
      shapes: of the base's parameters.
    """
    if _means_just(config, stacks, shapes):
        return config
    some = {s.layers for s in stacks.values() if s.layers and len(s.layers) < s.sizes[0]}
    here = config.replace(
        target_modules=sorted({trees.dotted(kernel_at(path, shapes)[1][:-1]) for path in stacks}),
        layers_to_transform=next(iter(some), None),
        layers_pattern=None,
    )
    if not _means_just(here, stacks, shapes):
        raise ValueError(
            "it adapts some layers of a stack that no layers_to_transform can tell: the layers "
            f"{sorted(some)}, and of other stacks or modules not the same"
        )
    warnings.warn(
        f"by the names here target_modules={config.target_modules!r} would mean other modules: the "
        f"config returned has target_modules={here.target_modules!r} and layers_to_transform="
        f"{here.layers_to_transform!r}",
        stacklevel=5,
    )
    return here


def _means_just(config: RandLoraConfig, stacks: Mapping[trees.Path, Stack], shapes: Shapes) -> bool:
    """Whether a config means exactly the kernels that have scales."""
    adapted = {kernel_at(path, shapes)[1][:-1]: stack for path, stack in stacks.items()}
    for module, stack in adapted.items():
        selection = targets.selection(config, trees.dotted(module))
        by_layer = selection is Selection.BY_LAYER
        if selection is Selection.NO or (by_layer and not stack.axes):
            return False
        meant = targets.layer_indices(config) if by_layer else None
        if stack.axes and stack.layers != (meant or tuple(range(stack.sizes[0]))):
            return False
    others = (p[:-1] for p in shapes if p[-1] == "kernel" and p[:-1] not in adapted)
    return all(targets.selection(config, trees.dotted(other)) is Selection.NO for other in others)


def in_torch(
    config: RandLoraConfig,
    scales: Collection[str],
    others: Collection[tuple[str, str]],
    shapes: Shapes,
    name_of: NameOf,
) -> RandLoraConfig:
    """The config, in torch's names where PEFT would else read it otherwise, or not at all.

    Args:
      scales, others: the adapter's modules, and its (module, name) of what else was trained.
    """
    names = {*scales, *names_of_kernels(shapes, name_of)}
    same = {name for name in names if targets.peft_matches(config, name)} == set(scales)
    if not same or config.all_linear or config.exclude_modules is not None:
        config = config.replace(
            target_modules=sorted(scales),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
    everywhere = config.bias == "all"
    here = config.bias == "randlora_only"
    is_bias = lambda module, leaf: leaf == "bias" and (everywhere or (here and module in scales))
    modules = {module for module, leaf in others if not is_bias(module, leaf)}
    if not all(targets.is_saved_whole(config, module) for module in modules):
        config = config.replace(modules_to_save=sorted(modules))
    return config.replace(save_projection=True)
