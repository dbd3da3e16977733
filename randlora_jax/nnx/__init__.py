"""RandLoRA for Flax NNX: a function that adapts the linear layers of any model, in place.

Paths of parameters, tied modules, containers and `isinstance` stay what they were: an adapted
layer gets a subclass of its own class, with its scales beside its kernel. The bases are one pair,
at the root of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from randlora_jax import adapters, checkpoint, merging, trees
from randlora_jax import bases as bases_lib
from randlora_jax.config import RandLoraConfig
from randlora_jax.dot_general import Strategy
from randlora_jax.kernels import SCALES, Kernel
from randlora_jax.nnx.classes import adapted, adapted_modules, lend_bases, rooted, set_class
from randlora_jax.nnx.discovery import Seen, find, name_of, shapes
from randlora_jax.nnx.layers import Plan, RandLoraBasis, RandLoraParam
from randlora_jax.nnx.state import (
    ADDED,
    base_variables,
    check_same,
    config_of,
    set_params,
    spread,
    trainable,
    update,
    variables,
)

__all__ = [
    "ADDED",
    "RandLoraBasis",
    "RandLoraParam",
    "inject",
    "lend_bases",
    "load_adapter",
    "merge",
    "remove",
    "set_active",
    "trainable",
    "update",
    "variables",
]


def inject(
    model: nnx.Module,
    config: RandLoraConfig | Mapping[str, RandLoraConfig],
    *,
    active: tuple[str, ...] | None = None,
    parameters: Mapping[str, tuple[int, ...]] | None = None,
    strategy: Strategy = "auto",
    rngs: nnx.Rngs | None = None,
    bases_dtype: jax.typing.DTypeLike = jnp.float32,
    values: trees.Tree | None = None,
) -> nnx.Module:
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
        of one at a dot, with the axes that are inputs, as in {"mlp.gating_einsum": (1,)}.
      strategy: "auto" picks the way with fewer operations; "merged" and "factored" force one.
      rngs: where `randlora_dropout` draws from, its stream "dropout". `model.eval()` and
        `model.train()` switch the dropout as they do `nnx.Dropout`.
      bases_dtype: of the bases that are drawn; bfloat16 halves them. Ternary bases are int8.
      values: scales and bases to begin with, as `variables` or `randlora_jax.load_adapter` give
        them; parameters too, where they trained.

    Returns:
      The model itself.

    Raises:
      ValueError: for targets that match nothing or nothing linear, and for shapes that don't fit,
        before anything is changed.

    Example:
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> x = jnp.ones((1, 4))
      >>> y = model(x)
      >>> _ = inject(model, RandLoraConfig(r=2, target_modules="all-linear"))
      >>> jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(model, RandLoraParam)))
      {'randlora_gamma': (2, 3), 'randlora_lambda': (2, 2)}
      >>> bool((model(x) == y).all()), isinstance(model, nnx.Linear)
      (True, True)
    """
    adapters.check_names(config, active)
    modules = dict(nnx.iter_modules(model))
    for path, module in modules.items():
        if hasattr(module, "randlora_class"):
            name = name_of(path) or "(root)"
            raise ValueError(f"{name!r} is injected already: merge or remove that first")
    named = adapters.named(config)
    dropout = rngs is not None and any(one.randlora_dropout for one in named.values())
    stream = rngs["dropout"] if dropout else None
    found, stored = {}, {}
    for name, one in named.items():
        seen = find(modules, one, parameters or {})
        kernels = {path: s.kernel for path, s in seen.items()}
        kept, stored[name] = adapters.cut_stacks(kernels, shapes(seen, one.r), one)
        found[name] = {path: seen[path] for path in kept}
    if values is None:
        scales, bases = _initial(named, found, stored, bases_dtype)
    else:
        scales, bases = values["randlora"], values["randlora_bases"]
        scales = scales if isinstance(config, Mapping) else {"": scales}
        for name, one in named.items():
            check_same(scales.get(name, {}), stored[name])
            whole = {"randlora": scales[name], "randlora_bases": bases, **base_variables(model)}
            for _ in merging.adapted(whole, one, ambiguous=True):
                pass  # each is checked as it is found
    _attach(named, found, scales, stream)
    plan = _plan(named, active)
    for module, kernels in _by_module(found):
        module.randlora_plan = Plan(kernels, plan, strategy)
        set_class(module, adapted(type(module)))
    # Every device needs all of the bases, as they are.
    sharded = any(s.out_sharding is not None for seen in found.values() for s in seen.values())
    for key, value in bases.items():
        metadata = {"out_sharding": (None,) * value.ndim} if sharded else {}
        setattr(model, key, RandLoraBasis(value, **metadata))
    model.randlora_config = config if isinstance(config, RandLoraConfig) else tuple(config.items())
    set_class(model, rooted(type(model)))
    set_params(model, {} if values is None else values.get("params", {}))
    return model


def _initial(named, found: Mapping[str, Mapping[trees.Path, Seen]], stored, dtype):
    seen = [s for kernels in found.values() for s in kernels.values()]

    def make():
        kernels = {name: {p: s.kernel for p, s in found[name].items()} for name in named}
        scales = {
            n: adapters.initial_scales(one, kernels[n], stored[n]) for n, one in named.items()
        }
        dims = bases_lib.shared_dims(s.kernel.sides for s in seen)
        return scales, bases_lib.draw(next(iter(named.values())), *dims, dtype)

    abstract = any(isinstance(s.variable.get_value(), jax.ShapeDtypeStruct) for s in seen)
    return jax.eval_shape(make) if abstract else make()


def _attach(named, found, scales, stream):
    """Gives the modules their scales, and what dropout needs."""
    for name, one in named.items():
        leaves = dict(trees.items(scales[name]))
        suffix = f":{name}" if name else ""
        for path, seen in found[name].items():
            module, size, holder = seen.module, seen.variable.shape[0], seen.module
            for label in seen.kernel.label:
                if not hasattr(module, label):
                    setattr(module, label, nnx.Dict())
                holder = getattr(module, label)
            rows = adapters.rows(one, path)
            for scale in SCALES:
                value = spread(leaves[(*path, scale)], rows, size)
                setattr(holder, scale + suffix, RandLoraParam(value, **seen.metadata(scale)))
            if rows is not None:
                kept = jnp.zeros((size, 1, 1)).at[jnp.array(rows)].set(1)
                setattr(module, "randlora_rows" + suffix, RandLoraBasis(kept))
            if one.randlora_dropout and not hasattr(module, "randlora_rngs"):
                if not hasattr(module, "deterministic"):
                    module.deterministic, module.randlora_switch = False, True
                sizes = seen.restack(())
                module.randlora_rngs = stream and (stream.split(sizes) if sizes else stream.fork())


def _by_module(found) -> list[tuple[nnx.Module, tuple[Kernel, ...]]]:
    kernels: dict[int, tuple[nnx.Module, dict[Kernel, None]]] = {}
    for seen in (s for kernels in found.values() for s in kernels.values()):
        kernels.setdefault(id(seen.module), (seen.module, {}))[1][seen.kernel] = None
    return [(module, tuple(own)) for module, own in kernels.values()]


def _plan(named, active) -> tuple[tuple[str, RandLoraConfig], ...]:
    names = adapters.active_names(named, active)
    return tuple((f":{name}" if name else "", named[name]) for name in names)


def set_active(model: nnx.Module, names: tuple[str, ...] | None) -> None:
    """Switches adapters: the updates of the `names` are summed from now on; () is the base alone.

    Example:
      >>> configs = {n: RandLoraConfig(r=2, target_modules="all-linear") for n in ("a", "b")}
      >>> model = inject(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), configs)
      >>> set_active(model, ("b",))
    """
    config = config_of(model)
    adapters.check_names(config, names)
    plan = _plan(adapters.named(config), names)
    for module in adapted_modules(model).values():
        module.randlora_plan = dataclasses.replace(module.randlora_plan, adapters=plan)


def load_adapter(path: str | epath.Path, model: nnx.Module, **options: Any) -> RandLoraConfig:
    """Loads what `save_adapter` saved, from a Linen or an NNX model, into an NNX model.

    Args:
      path: a folder that `save_adapter` made.
      model: not injected yet, or with this same adapter's config.
      **options: for `inject`.

    Returns:
      The adapter's config.

    Raises:
      ValueError, FileNotFoundError: as `randlora_jax.load_adapter`; the model is as it was then.
    """
    loaded, config = checkpoint.load_adapter(path, base_variables(model))
    if "randlora_config" not in vars(model):
        inject(model, config, values=loaded, **options)
    elif config_of(model) == config:
        update(model, loaded)
    else:
        raise ValueError(
            f"{path} has another config than the adapter that the model has: merge or remove that "
            f"first. They are {config} and {config_of(model)}"
        )
    return config


def merge(model: nnx.Module, *, safe: bool = True) -> nnx.Module:
    """Folds the active updates into the kernels, and takes away what `inject` added.

    Computed in float32 and rounded once to each kernel's dtype; shardings stay.

    Args:
      model: an injected model; it is changed in place.
      safe: refuse results that are not finite. It needs real values: no effect under `jit`.

    Raises:
      ValueError: naming the layer, if its merged kernel is not finite; nothing is changed then.
    """
    config, values = config_of(model), variables(model)
    known, plan = {}, ()
    for path, module in adapted_modules(model).items():
        plan = module.randlora_plan.adapters
        for kernel in module.randlora_plan.kernels:
            known[(*map(str, path), *kernel.label)] = kernel
    params = values["params"]
    for suffix, _ in plan:
        one, single = adapters.select(values, config, suffix.removeprefix(":"))
        params = merging.merge({**one, "params": params}, single, safe=safe, known=known)
    set_params(model, params)
    return remove(model)


def remove(model: nnx.Module) -> nnx.Module:
    """Takes away what `inject` added, and leaves the parameters as they are."""
    config_of(model)
    layers = adapted_modules(model).values()
    set_class(model, type(model).randlora_class)
    for module in layers:
        labels = {label for kernel in module.randlora_plan.kernels for label in kernel.label}
        for key in labels | ({"deterministic"} if hasattr(module, "randlora_switch") else set()):
            delattr(module, key)
        set_class(module, type(module).randlora_class)
    for module in (*layers, model):
        for key in [key for key in vars(module) if key.startswith("randlora_")]:
            delattr(module, key)
    return model
