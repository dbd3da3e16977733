"""How an NNX layer with scales runs with its updates: on a view of itself that has been changed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from randlora_jax import updates
from randlora_jax.config import RandLoraConfig
from randlora_jax.layer_call import Call, Change
from randlora_jax.nnx.discovery import original_class
from randlora_jax.nnx.lending import IDS, STRENGTH, lent_to
from randlora_jax.ops import Dropout
from randlora_jax.ops.costs import Strategy
from randlora_jax.ops.division import Told
from randlora_jax.ops.rows import checked_ids
from randlora_jax.prepared import prepare
from randlora_jax.quantised import is_quantised
from randlora_jax.sites import LAMBDA, SCALES, Kernel, scale_name


class RandLoraParam(nnx.LoRAParam[Any]):
    """Scales: what trains."""


# As the collection is called in Linen: so that it is what it is across Flax's bridges too.
nnx.register_variable_name("randlora", RandLoraParam, overwrite=True)


@dataclasses.dataclass(frozen=True, repr=False)
class AdaptedLayer:
    """The static part of an adapted module, its attribute `randlora_layer`.

    Attributes:
      kernels: as one layer has them, where the module is a stack.
      adapters: (name, config) of the active ones.
      told: how the arrays of kernels are divided, where `set_layout` has told it; None stands for
        a quantised kernel without an update.
    """

    kernels: tuple[Kernel, ...]
    adapters: tuple[tuple[str, RandLoraConfig], ...]
    strategy: Strategy
    told: tuple[tuple[Kernel | None, Told], ...] = ()

    def __repr__(self) -> str:  # the configs, at the root, would be a page for every layer
        kernels = ", ".join(kernel.name for kernel in self.kernels)
        active = ", ".join(name or "active" for name, _ in self.adapters)
        return f"AdaptedLayer({kernels}: {active or 'none active'})"


def holder(module: Any, kernel: Kernel) -> Any:
    """What has a kernel's scales: the module, or an `nnx.Dict` beside the kernel."""
    return getattr(module, kernel.label[0]) if kernel.label else module


def has_scales(module: Any, kernel: Kernel, adapter: str) -> bool:
    """Whether the adapter has scales for a kernel."""
    return scale_name(LAMBDA, adapter) in vars(holder(module, kernel))


def scales_of(module: Any, kernel: Kernel, adapter: str) -> list[RandLoraParam]:
    """The variables of lambda and gamma."""
    beside = holder(module, kernel)
    return [getattr(beside, scale_name(scale, adapter)) for scale in SCALES]


def quantised_of(module: Any) -> dict[str, Any]:
    """A module's own quantised parameters by name."""
    own = {k: v.get_value() for k, v in vars(module).items() if isinstance(v, nnx.Param)}
    return {name: value for name, value in own.items() if is_quantised(value)}


def call(module: Any, method: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
    """Calls an adapted module's own method, of the name, with the active updates."""
    adapted: AdaptedLayer = module.randlora_layer
    active = [
        (kernel, adapter, config)
        for kernel in adapted.kernels
        for adapter, config in adapted.adapters
        if has_scales(module, kernel, adapter)
    ]
    quantised = quantised_of(module)
    if not active and not quantised:
        return method(module, *args, **kwargs)
    bases, found = lent_to(module) if active else {}, []
    ids = checked_ids(bases.get(IDS), bases if active else None)
    for kernel, adapter, config in active:
        lam, gamma = (scale.get_value() for scale in scales_of(module, kernel, adapter))
        mask = getattr(module, scale_name("randlora_rows", adapter), None)
        if mask is not None:
            lam = lam * mask.get_value().reshape((1,) * lam.ndim).astype(lam.dtype)
        strength = bases.get(scale_name(STRENGTH, adapter))
        if strength is not None:
            lam = lam * strength.astype(lam.dtype)
        dropout = _dropout(module, config)
        target = f"{original_class(module).__name__}.{kernel.name}"
        _check_whole(target, getattr(module, kernel.name).shape, kernel.shape)
        scales = lam, gamma
        found.append(prepare(target, kernel, config, bases, scales, dropout, ids))
    called = NnxCall(module, original_class(module), name, args, kwargs, quantised, method)
    told = dict(adapted.told).get(found[0].kernel if found else None)
    return updates.run(called, found, bases, adapted.strategy, told)


def _check_whole(target: str, shape: Sequence[int], injected: Sequence[int]) -> None:
    """Raises a ValueError for a kernel that is not of the size that it was injected with."""
    if len(shape) == len(injected) and tuple(shape) != tuple(injected):
        raise ValueError(
            f"{target} has the shape {tuple(shape)}, and had {tuple(injected)} when it was "
            "injected: a part of a kernel, divided by hand within jax.shard_map, has no update of "
            "its own. Leave that axis to the compiler: jax.shard_map(..., axis_names=...) without "
            "it"
        )


@dataclasses.dataclass(frozen=True)
class NnxCall(Call):
    """A call of an NNX module's method, which is `function` as it is written."""

    function: Callable[..., Any]

    def _run(self, change, attributes, args, beside):
        del beside  # nobody looks on
        changes = {} if change is None else self._changed(change)
        return self._on_view({**attributes, **changes}, args)

    def _changed(self, change: Change) -> dict[str, Any]:
        """The variables that differ where parameters are changed."""
        kernels = {kernel.name for kernel in self.layer.randlora_layer.kernels}
        changes: dict[str, Any] = {}
        for name, leaf in vars(self.layer).items():
            base = isinstance(leaf, nnx.Param) and not isinstance(leaf, RandLoraParam)
            if base or name in kernels:
                value = leaf.get_value()
                changed = change(name, value)
                changes |= {} if changed is value else {name: leaf.replace(changed)}
        return changes

    def _on_view(self, changes: Mapping[str, Any], args: Any) -> Any:
        """Calls the method on a view: the module as its own class made it, but for the changes."""
        view = object.__new__(self.cls)
        labels = {label for kernel in self.layer.randlora_layer.kernels for label in kernel.label}
        own = {
            name: value
            for name, value in vars(self.layer).items()
            if name not in labels and not name.startswith("randlora_")
        }
        vars(view).update(own, **changes)
        y = self.function(view, *args, **self.kwargs)
        # What the method has stored, as `sow` and caches do, belongs to the module.
        stored = {name: value for name, value in vars(view).items() if name not in changes}
        vars(self.layer).update(stored)
        return y


def _dropout(module: Any, config: RandLoraConfig) -> Dropout | None:
    if config.randlora_dropout == 0 or module.deterministic:
        return None
    if module.randlora_rngs is None:
        raise ValueError(
            f"randlora_dropout={config.randlora_dropout} has nothing to draw from: inject(model, "
            "config, rngs=nnx.Rngs(0)) gives it, and model.eval() switches the dropout off"
        )
    layer = nnx.Dropout(config.randlora_dropout, deterministic=False)
    draw = functools.partial(layer, rngs=module.randlora_rngs)
    return Dropout(config.randlora_dropout, draw)
