"""The interceptor that runs the layers of a Linen model with their updates."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import LazyRng
from flax.linen.module import InterceptorContext

from randlora_jax import targets, trees, updates
from randlora_jax.bases import Bases
from randlora_jax.config import RandLoraConfig
from randlora_jax.layout import Layout
from randlora_jax.linen.calls import OurCall, is_lifted, method_of, unseen
from randlora_jax.linen.discovery import adaptable
from randlora_jax.linen.layer_call import LinenCall, Running
from randlora_jax.linen.scales import beside_kernels
from randlora_jax.ops import Dropout
from randlora_jax.ops.costs import Strategy
from randlora_jax.prepared import Update, prepare
from randlora_jax.quantised import is_quantised
from randlora_jax.raw_parameters import Parameters
from randlora_jax.registry import Arguments
from randlora_jax.sites import (
    GAMMA,
    LAMBDA,
    NUMBER,
    SCALES,
    Kernel,
    is_scale,
    parse_label,
    scale_name,
)
from randlora_jax.targets import Selection


@dataclasses.dataclass(eq=False)
class Interceptor:
    """Runs each module that holds scales with the updates, whichever of its methods is called.

    Attributes:
      adapters: the active ones by name.
      deterministic: whether dropout is off.
      layout: how arrays are divided, if it is told.
      key: of the call's dropout, for layers that the model's own transforms give none.
      ids: of the adapters of rows, where the scales are a table's.
      depth: length of the base's own path, where it is within another module.
      calls: what runs as the model's own.
      drawn: how often a module has had a key of `key`.
      running: the kernels of modules of which a method runs, with the updates, already; apart for
        the model's own modules and for those of an `apply` within it.
    """

    adapters: Mapping[str, RandLoraConfig]
    parameters: Parameters
    bases: Bases
    deterministic: bool
    strategy: Strategy
    layout: Layout | None = None
    key: Any = None
    ids: Any = None
    depth: int = 0
    calls: OurCall = dataclasses.field(default_factory=OurCall)
    running: dict[bool, Running] = dataclasses.field(default_factory=dict)
    drawn: collections.Counter[trees.Path] = dataclasses.field(default_factory=collections.Counter)

    def params(self, variables: trees.Tree) -> dict[str, Any]:
        """The base's parameters with all that its layers need beside their kernels."""
        return beside_kernels(variables, self.adapters, numbered=not self.deterministic)

    def __call__(
        self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext
    ) -> Any:
        """One call of any module's method, as Flax hands it over."""
        module, method = context.module, method_of(context)
        own = self.calls.has(module)
        quantised = {} if method is None else _quantised(module, method)
        # Of an `apply` within the model, only what it was given from this one's parameters.
        ours = self.adapters and (own or _has_scales(module))
        if method is None or not (ours or quantised):
            return next_fun(*args, **kwargs)
        running = self.running.setdefault(own, set())
        found = self._updates(module, (args, kwargs) if method == "__call__" else None, own)
        found = [u for u in found if (module.path, u.kernel.name) not in running]
        quantised = {k: v for k, v in quantised.items() if (module.path, k) not in running}
        if not found and not quantised:
            return next_fun(*args, **kwargs)
        taken = {(module.path, name) for name in (*(u.kernel.name for u in found), *quantised)}
        function: Any = context.orig_method
        call = LinenCall(
            *(module, type(module), method, args, kwargs, quantised),
            *(function.func, next_fun, self, running, taken),
        )
        label = found[0].kernel.label if found else ()
        path = (*module.path[self.depth :], *label)
        told = self.layout.told(path) if self.layout else None
        return updates.run(call, found, self.bases, self.strategy, told)

    def _updates(self, module: nn.Module, call: Arguments | None, own: bool) -> list[Update]:
        name = trees.dotted(module.path[self.depth :])
        if not self.adapters:
            return []
        config = next(iter(self.adapters.values()))
        params, found = module.variables.get("params", {}), []
        kernels = adaptable(module, name, config, self.parameters, call)
        slots = 0 if self.ids is None else 1  # an axis of the scales of one layer
        kernels |= _scaled_kernels(name, params, kernels, slots)
        for kernel, target in kernels.items():
            beside = params.get(kernel.label[0], {}) if kernel.label else params
            for adapter, config in self.adapters.items():
                names = [scale_name(scale, adapter) for scale in SCALES]
                if names[0] in beside:
                    lam, gamma = (trees.unboxed(beside[name]) for name in names)
                    if lam.ndim > slots + 2 + len(kernel.stacked):
                        break  # the outside of a lifted layer, which comes again inside
                    number = trees.unboxed(beside.get(scale_name(NUMBER, adapter)))
                    scales, dropout = (lam, gamma), self._dropout(module, config, number)
                    given = target, kernel, config, self.bases, scales, dropout, self.ids
                    found.append(prepare(*given))
                elif own and call is not None and target == name and _is_target(config, name):
                    raise ValueError(
                        f"{target!r} is one of target_modules but has no scales in 'randlora': "
                        "they are of another config or another model"
                    )
        return found

    def _dropout(
        self, module: nn.Module, config: RandLoraConfig, number: jax.Array | None
    ) -> Dropout | None:
        if self.deterministic or config.randlora_dropout == 0:
            return None
        layer: Any = nn.Dropout(config.randlora_dropout, deterministic=False, parent=None)
        apply = functools.partial(layer.apply, {}, rngs={"dropout": self._key(module, number)})

        def dropout(x):
            with unseen():
                return apply(x)

        return Dropout(config.randlora_dropout, dropout)

    def _key(self, module: nn.Module, number: jax.Array | None) -> jax.Array:
        # A base without dropout of its own has no reason to hand "dropout" through its `nn.scan`,
        # or to an `apply` within. Elsewhere, as under a `nn.vmap` of examples, it alone can tell.
        apart = number is not None or not self.calls.has(module)
        if module.has_rng("dropout") or self.key is None or not apart:
            return module.make_rng("dropout")
        self.drawn[module.path] += 1
        key = self.key.as_jax_rng() if isinstance(self.key, LazyRng) else self.key
        if number is not None:  # it says which layer of which stack, where paths may be a cache's
            key = jax.random.fold_in(key, number.reshape(-1)[0].astype(jnp.uint32))
        return jax.random.fold_in(key, self.drawn[module.path])


def _is_target(config: RandLoraConfig, name: str) -> bool:
    return targets.selection(config, name) is Selection.YES


def _quantised(module: nn.Module, method: str) -> dict[str, Any]:
    """A module's own quantised parameters, if the method is not one that runs inside a stack."""
    cls: Any = type(module)
    if is_lifted(cls, method):
        return {}
    own = module.variables.get("params", {}) if module.scope is not None else {}
    return {name: trees.unboxed(leaf) for name, leaf in own.items() if is_quantised(leaf)}


def _has_scales(module: nn.Module) -> bool:
    own = module.variables.get("params", {}) if module.scope is not None else {}
    return any(is_scale(key) or LAMBDA in _names(leaf) for key, leaf in own.items())


def _names(leaf: Any) -> set[str]:
    """What is beside a kernel that has a label, less the names of adapters."""
    return {key.partition(":")[0] for key in leaf} if isinstance(leaf, Mapping) else set()


def _scaled_kernels(
    name: str, params: Mapping[str, Any], known: Mapping[Kernel, str], slots: int
) -> dict[Kernel, str]:
    """A module's kernels as their scales have them, where nothing else tells of them.

    A method may not say how its layer's call uses the kernel; and a model that was built from a
    loaded adapter may lack its `parameters`, or the rule of its class.
    """
    found, claimed = {}, {kernel.name for kernel in known}
    for key, leaf in params.items():
        (*_, labelled), axes = parse_label((key,))
        # Scales alone, and no parameters of a module that is called so.
        ours = isinstance(leaf, Mapping) and leaf and all(map(is_scale, leaf))
        if axes is not None and labelled in params and labelled not in claimed and ours:
            value, scale = (trees.unboxed(a) for a in (params[labelled], next(iter(leaf.values()))))
            if scale.ndim == slots + 2 + len(axes.stacked):  # else outside of a lifted layer
                kernel = Kernel(value.shape, axes.inputs, labelled, value.dtype, axes.stacked)
                found[kernel] = name
    shapes = {  # of any adapter's, for they agree
        key.partition(":")[0]: trees.unboxed(leaf).shape[slots:]
        for key, leaf in params.items()
        if is_scale(key)
    }
    if "kernel" not in params or "kernel" in claimed or len(shapes.get(LAMBDA, ())) != 2:
        return found
    value = trees.unboxed(params["kernel"])
    for i in range(1, value.ndim):
        kernel = Kernel(value.shape, tuple(range(i)), "kernel", value.dtype)
        if kernel.scale_shapes(shapes[LAMBDA][0]) == (shapes[LAMBDA], shapes[GAMMA]):
            return found | {kernel: name}
    return found
