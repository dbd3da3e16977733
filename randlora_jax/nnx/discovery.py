"""Which kernels of an NNX model are to be adapted, and how they are stored: without running it."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from randlora_jax import targets, trees
from randlora_jax.config import RandLoraConfig
from randlora_jax.equations import KernelAxes
from randlora_jax.left_out import Seen, may_be_kernels, warn_of_left_out
from randlora_jax.quantised import wrapped_by_qwix
from randlora_jax.raw_parameters import Parameters, check_parameters, raw_kernels
from randlora_jax.registry import (
    LayerRule,
    add_no_linear_layer,
    add_rule,
    check_has_kernel,
    check_orientation,
    rule_for,
)
from randlora_jax.sites import Site, Stack
from randlora_jax.stacks import select_layers
from randlora_jax.targets import Selection

Modules = Mapping[trees.Path, nnx.Module]


def _linear_general(layer: Any) -> dict[str, KernelAxes]:
    stacked, inputs = len(layer.batch_axis), len(layer.in_features)
    axes = KernelAxes(tuple(range(stacked)), tuple(range(stacked, stacked + inputs)))
    return {"kernel": axes}


_RULES = (
    LayerRule(
        nnx.Linear,
        input_axes=(0,),
        product="dot_general",
        kernel_shape=lambda layer: (layer.in_features, layer.out_features),
    ),
    LayerRule(
        nnx.LinearGeneral,
        _linear_general,
        product="dot_general",
        kernel_shape=lambda x: (*x.batch_axis.values(), *x.in_features, *x.out_features),
    ),
    LayerRule(
        nnx.Einsum,
        product="einsum_op",
        plain=lambda layer: getattr(layer, "einsum_op", jnp.einsum) is jnp.einsum,
        kernel_shape=lambda layer: layer.kernel_shape,
    ),
)
for _rule in _RULES:
    add_rule(_rule)
for _name in ["Embed", "Conv", "ConvTranspose", "PReLU", "LoRA"]:
    add_no_linear_layer(getattr(nnx, _name))
for _name in ["Batch", "Layer", "RMS", "Group", "Instance", "Weight", "Spectral"]:
    add_no_linear_layer(getattr(nnx, _name + "Norm"))


def original_class(module: Any) -> Any:
    """A module's class as the user wrote it; the root of a model can be a layer too."""
    cls = type(module)
    while hasattr(cls, "randlora_class"):
        cls = cls.randlora_class
    return cls


def modules_of(model: nnx.Module) -> dict[trees.Path, nnx.Module]:
    """A model's modules by path, less what holds scales; the third of a list is "2"."""
    # Graph mode, whichever is set: what `nnx.jit` lends to the layers of its method they share.
    found = {tuple(map(str, path)): module for path, module in nnx.iter_modules(model, graph=True)}
    adapted = (
        (p, vars(m)["randlora_layer"]) for p, m in found.items() if "randlora_layer" in vars(m)
    )
    ours = {(*path, label) for path, a in adapted for k in a.kernels for label in k.label}
    return {path: module for path, module in found.items() if path not in ours}


def check_model(model: Any, modules: Modules) -> None:
    """Raises a TypeError or a ValueError for what is no NNX model, or one that qwix has wrapped."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an NNX module, got a {type(model).__name__}: it comes first; "
            "randlora_jax.linen has the same for a Linen module"
        )
    for path, module in modules.items():
        if wrapped_by_qwix(type(module)):
            raise ValueError(
                f"{trees.shown(path)} is what qwix.quantize_model makes, whose kernels are no "
                "variables, and which quantises inside its calls, activations too where act_qtype "
                "says so: randlora_jax.nnx.quantize(model, qtype='int8') of the model itself, and "
                "then inject"
            )


def variables_of(model: nnx.Module, kind: Any = nnx.Variable) -> dict[trees.Path, Any]:
    """A model's own variables of a kind by path, those in dictionaries of its modules too."""
    nodes = ((tuple(map(str, path)), node) for path, node in nnx.iter_graph(model, graph=True))
    found = {path: node for path, node in nodes if isinstance(node, kind)}
    return {p: v for p, v in found.items() if not any(n.startswith("randlora_") for n in p)}


def find(modules: Modules, config: RandLoraConfig, parameters: Parameters) -> list[Site]:
    """The sites of a model.

    Raises:
      ValueError: naming the module, for targets that match nothing, or nothing that can be adapted.
    """
    known: dict[str, tuple[type, bool]] = {}
    sites, paths = [], []
    for path, module in modules.items():
        name, rule = trees.dotted(path), rule_for(type(module))
        own = {k: v for k, v in vars(module).items() if isinstance(v, nnx.Variable)}
        own = {k: v for k, v in own.items() if not k.startswith("randlora_")}
        kernels = rule.kernels_of(module) if rule is not None else {}
        there = [label for label in kernels if label in own]
        known[name] = original_class(module), bool(there)
        if rule is not None and targets.selection(config, name) is not Selection.NO:
            check_has_kernel(kernels, name, own, config)
            for label in there:
                sites.append(_site(path, module, rule, label, config))
        values = {label: variable.get_value() for label, variable in own.items()}
        paths += [(*path, label) for label in own]
        for target, (kernel, stack) in raw_kernels(name, values, parameters).items():
            sites.append(Site(path, kernel, stack))
            known[target] = original_class(module), True
    check_parameters(parameters, map(trees.dotted, paths))
    shapes = {path: v.get_value().shape for path, v in variables_of(modules[()], nnx.Param).items()}
    free = may_be_kernels(shapes, {site.kernel_path for site in sites})
    raw = {trees.dotted(site.kernel_path) for site in sites}
    targets.check(config, known, parameters=map(trees.dotted, free), raw=raw)
    _refuse_tied(modules, sites)
    check_orientation(sites, config)
    return select_layers({site.path: site for site in sites}.values(), config)


def tell_left_out(
    modules: Modules, sites: Mapping[str, Sequence[Site]], configs: Mapping[str, RandLoraConfig]
) -> None:
    """Warns of what "all-linear" leaves out."""
    shapes = {path: v.get_value().shape for path, v in variables_of(modules[()], nnx.Param).items()}
    classes = {trees.dotted(path): original_class(module) for path, module in modules.items()}
    warn_of_left_out(Seen(classes, shapes), sites, configs, stacklevel=4)


def variable_of(modules: Modules, site: Site) -> nnx.Variable[Any]:
    """The kernel's variable."""
    return getattr(modules[site.module], site.kernel.name)


def axis_names(variable: nnx.Variable[Any]) -> tuple[Any, ...] | None:
    """The names of a variable's axes, as far as it has any."""
    names = variable.get_metadata().get("out_sharding")
    return None if names is None else tuple(getattr(names, "spec", names))


def _site(
    path: trees.Path, module: Any, rule: LayerRule, label: str, config: RandLoraConfig
) -> Site:
    variable = getattr(module, label)
    value = variable.get_value()
    try:
        axes = rule.stack_axes(module, label, value.shape, _named_stack_axes(variable))
        layer, sizes = Stack(axes).split(value.shape)
        struct = jax.ShapeDtypeStruct(layer, value.dtype)
        kernel = rule.describe(module, label, struct, config.fan_in_fan_out, ((), {}))
        assert kernel is not None  # a call was given, if without arguments
    except ValueError as error:
        raise ValueError(f"{trees.shown(path)}: {error}") from None
    return Site(path, kernel, Stack(axes, sizes))


def _named_stack_axes(variable: nnx.Variable[Any]) -> tuple[int, ...]:
    """The axis of a stack, where the variable itself says what it is called, as MaxText's do."""
    names, name = axis_names(variable), variable.get_metadata().get(nnx.PARTITION_NAME)
    return (names.index(name),) if names and name in names else ()


def _refuse_tied(modules: Modules, sites: list[Site]) -> None:
    held = collections.Counter(
        id(v) for m in modules.values() for v in vars(m).values() if isinstance(v, nnx.Variable)
    )
    for site in sites:
        if held[id(variable_of(modules, site))] > 1:
            raise ValueError(
                f"the {site.kernel.name!r} of {trees.shown(site.module)} is that of another "
                "module too, which an update would change: give its name to exclude_modules"
            )
