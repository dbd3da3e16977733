"""RandLoRA for Flax NNX: a function that adapts the linear layers of any model, in place.

Paths of parameters, tied modules, containers and `isinstance` stay what they were: an adapted
layer gets a subclass of its own class, with its scales beside its kernel. The bases are one pair,
at the root of the model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from randlora_jax import checkpoint, merging, trees
from randlora_jax.adapters import named
from randlora_jax.checks import check_config, check_variables
from randlora_jax.config import RandLoraConfig
from randlora_jax.equations import equation_for
from randlora_jax.initial import initial_values
from randlora_jax.nnx.attaching import (
    Adapters,
    Scales,
    attach,
    attach_products,
    given_scales,
    making_variables,
)
from randlora_jax.nnx.classes import all_or_nothing, set_class, take_class
from randlora_jax.nnx.discovery import (
    axis_names,
    check_model,
    find,
    modules_of,
    original_class,
    tell_left_out,
    variable_of,
)
from randlora_jax.nnx.lending import RandLoraBasis, adapted_modules, unsettle
from randlora_jax.nnx.state import (
    active_of,
    base_variables,
    check_params,
    config_of,
    set_config,
    set_params,
    strengths_of,
    update,
    variables,
)
from randlora_jax.ops.costs import Strategy
from randlora_jax.raw_parameters import Parameters
from randlora_jax.registry import Axes, rule_for
from randlora_jax.sharding import whole_beside
from randlora_jax.sites import Site, parse_label
from randlora_jax.stored import scale_pairs

Model = TypeVar("Model", bound=nnx.Module)


class InjectOptions(TypedDict, total=False):
    """The options of `inject` that `load_adapter` takes too."""

    active: tuple[str, ...] | None
    parameters: Parameters | None
    strategy: Strategy
    rngs: nnx.Rngs | None
    bases_dtype: jax.typing.DTypeLike
    data_axes: Sequence[str] | None


def inject(
    model: Model,
    config: RandLoraConfig | Mapping[str, RandLoraConfig],
    *,
    active: tuple[str, ...] | None = None,
    parameters: Parameters | None = None,
    strategy: Strategy = "auto",
    rngs: nnx.Rngs | None = None,
    bases_dtype: jax.typing.DTypeLike = jnp.float32,
    data_axes: Sequence[str] | None = None,
    values: trees.Tree | None = None,
) -> Model:
    """Adapts a model's linear layers in place: they compute with `W + dW` from now on.

    Each adapted kernel gets a `randlora_lambda` (r, n) and a `randlora_gamma` (n, min(in, out)),
    stacked where the kernel is, and the model `randlora_A` and `randlora_B`, once for all layers.
    On an abstract model, made by `nnx.eval_shape`, what is added is abstract too.

    Args:
      model: any NNX module.
      config: what to adapt and how; or several adapters by name, {"chat": config, ...}, on the
        same bases. Then the names of their scales end in ":chat".
      active: the names whose updates are summed; all by default, () for the base alone.
      parameters: raw parameters to adapt, which belong to no layer and no stack: by path, or suffix
        of one at a dot, with the axes that are inputs, as in {"mlp.gating_einsum": (1,)}; or with
        an equation "x, kernel -> y", {"moe.gate": "ecd,edf->ecf"}, of which an axis that all three
        share is a stack: each expert has scales of its own, however the model uses them.
      strategy: "auto" picks the way with fewer operations, and then bytes; "merged", "factored" and
        "vectors" force one.
      rngs: where `randlora_dropout` draws from, its stream "dropout". `model.eval()` and
        `model.train()` switch the dropout as they do `nnx.Dropout`.
      bases_dtype: of the bases that are drawn; bfloat16 halves them. Ternary bases are int8.
      data_axes: mesh axes that divide the batch. What is added is whole on each device of the mesh
        that the model is on; with this given, a gamma is divided along all other axes like the
        side of the kernel that it scales, as by `randlora_jax.sharding`.
      values: scales and bases to begin with, as `variables` or `randlora_jax.load_adapter` give
        them; parameters too, where they trained. With those of `randlora_jax.adapters.table` the
        model's methods take `adapter_ids=`, one number for each row, as Linen's `apply` does.

    Returns:
      The model itself.

    Raises:
      ValueError: for targets that match nothing or nothing linear, and for shapes that don't fit,
        before anything is changed.

    Example:
      >>> from randlora_jax.nnx import RandLoraParam
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> x = jnp.ones((1, 4))
      >>> y = model(x)
      >>> _ = inject(model, RandLoraConfig(r=2, target_modules="all-linear"))
      >>> jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(model, RandLoraParam)))
      {'randlora_gamma': (2, 3), 'randlora_lambda': (2, 2)}
      >>> bool((model(x) == y).all()), isinstance(model, nnx.Linear)
      (True, True)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an NNX module, got a {type(model).__name__}: it comes first, then the "
            "config; randlora_jax.linen.RandLora wraps a Linen module"
        )
    check_config(config, several=True)
    named.check(config, active)
    modules, configs = modules_of(model), named.by_name(config)
    check_model(model, modules)
    for path, module in modules.items():
        adapted = vars(module).get("randlora_layer")
        if "randlora_config" in vars(module) or (adapted is not None and adapted.kernels):
            raise ValueError(f"{trees.shown(path)} is injected already: merge or remove that first")
    sites = {name: find(modules, one, parameters or {}) for name, one in configs.items()}
    kernels = [variable_of(modules, site) for own in sites.values() for site in own]
    base, params = base_variables(model), {}
    scales: Mapping[str, Scales]
    if values is None:
        make = lambda: initial_values(configs, sites, bases_dtype)
        abstract = any(isinstance(k.get_value(), jax.ShapeDtypeStruct) for k in kernels)
        scales, bases = jax.eval_shape(make) if abstract else make()
    else:
        check_variables(values, "randlora", "randlora_bases")
        bases, params = values["randlora_bases"], values.get("params", {})
        check_params(params, base["params"])
        given = {name: named.scales_of(values, name) for name in configs}
        together = {**base, "randlora_bases": bases}
        scales = {n: given_scales(given[n], configs[n], sites[n], together) for n in configs}
    tell_left_out(modules, sites, configs)
    scales, bases = whole_beside(base["params"], (scales, bases))
    # Every device needs all of the bases, as they are.
    sharded = any(axis_names(kernel) is not None for kernel in kernels)
    with making_variables(base["params"]), all_or_nothing(modules.values()):
        new = Adapters(configs, sites, scales)
        acting = tuple(named.active(config, active).items())
        attach(model, modules, new, acting, strategy, rngs, data_axes)
        for key, value in bases.items():
            metadata: dict[str, Any] = {"out_sharding": (None,) * value.ndim} if sharded else {}
            setattr(model, key, RandLoraBasis(value, **metadata))
        set_config(model, config)
        take_class(model, adapted="randlora_layer" in vars(model), root=True)
    set_params(model, params)
    return model


def load_adapter(
    path: str | os.PathLike[str], model: nnx.Module, **options: Unpack[InjectOptions]
) -> RandLoraConfig:
    """Loads what `save_adapter` saved, from a Linen or an NNX model, into an NNX model.

    Args:
      path: a folder that `save_adapter` made.
      model: not injected yet, or with this same adapter's config.
      **options: for `inject`; `parameters` are those that the adapter has scales for.

    Returns:
      The adapter's config.

    Raises:
      ValueError, FileNotFoundError: as `randlora_jax.load_adapter`; the model is as it was then.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an NNX module, got a {type(model).__name__}: path first")
    injected = "randlora_config" in vars(model)
    own = config_of(model) if injected else None
    if isinstance(own, dict):
        raise ValueError(
            f"the model has the adapters {sorted(own)}: to add this one to them, `loaded, config = "
            "randlora_jax.load_adapter(path, variables(model))`, then `insert(model, name, config, "
            "values=loaded)`"
        )
    loaded, config = checkpoint.load_adapter(path, base_variables(model), own)
    if injected:
        update(model, loaded)
    else:
        options.setdefault("parameters", _raw_parameters(model, loaded))
        inject(model, config, values=loaded, **options)
    return config


def _raw_parameters(model: nnx.Module, values: trees.Tree) -> dict[str, Axes]:
    """What `inject` calls `parameters`, as the labels of scales tell it."""
    modules, params = modules_of(model), dict(trees.items(values["params"]))
    found: dict[str, Axes] = {}
    for path, (lam, _) in scale_pairs(values["randlora"]):
        where, axes = parse_label(path, params)
        module = modules.get(where[:-1])
        rule = rule_for(type(module)) if module is not None else None
        known = rule.kernels_of(module) if rule is not None else ()
        if axes is not None and where[-1] not in known:
            outer = trees.unboxed(lam).ndim - 2 - len(axes.stacked)  # a stack of layers
            ndim = trees.unboxed(params[where]).ndim - outer
            found[trees.dotted(where)] = equation_for(axes, ndim) if outer else axes
    return found


def merge(model: Model, *, safe: bool = True, requantize: bool = False) -> Model:
    """Folds the active updates into the kernels, and takes away what `inject` added.

    Computed in float32 and rounded once to each kernel's dtype; shardings stay. To undo it, keep
    `values = variables(model)` before, and `inject(model, config, values=values)` after: that puts
    the old kernels back, bit for bit.

    Args:
      model: an injected model; it is changed in place.
      safe: refuse results that are not finite. It needs real values: no effect under `jit`.
      requantize: as for `randlora_jax.merge`; by default a quantised base becomes floats.

    Raises:
      ValueError: naming the layer, if its merged kernel is not finite; nothing is changed then.
    """
    known = {}
    for path, module in adapted_modules(model).items():
        for kernel in module.randlora_layer.kernels:
            site = Site(path, kernel)
            known[site.path] = site
    config, strengths = config_of(model), strengths_of(model)
    values = named.with_strength(variables(model), config, strengths)
    options = {"safe": safe, "requantize": requantize}
    params = merging.merge_adapters(values, config, active_of(model), known, **options)
    set_params(model, params)
    return remove(model)


def remove(model: Model) -> Model:
    """Takes away what `inject` added, and leaves the parameters as they are, quantised or not."""
    config_of(model)
    modules: Mapping[trees.Path, Any] = modules_of(model)
    layers: list[Any] = [module for module in modules.values() if "randlora_layer" in vars(module)]
    with all_or_nothing((*layers, model)):
        for module in layers:
            unsettle(module)
            labels = {label for kernel in module.randlora_layer.kernels for label in kernel.label}
            labels |= {"deterministic"} if hasattr(module, "randlora_switch") else set()
            for key in labels:
                delattr(module, key)
        for module in (*layers, model):
            set_class(module, original_class(module))
            for key in [key for key in vars(module) if key.startswith("randlora_")]:
                delattr(module, key)
        attach_products(modules)
    return model
