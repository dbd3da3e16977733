"""The interceptor that runs the layers of a Linen model with their updates."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
from flax.linen.module import InterceptorContext

from randlora_jax import targets, trees, updates
from randlora_jax.bases import Bases
from randlora_jax.config import RandLoraConfig
from randlora_jax.linen.calls import OurCall
from randlora_jax.linen.discovery import adaptable
from randlora_jax.ops.costs import Strategy
from randlora_jax.registry import Parameters
from randlora_jax.sites import SCALES, Kernel, is_scale, parse_label, scale_name
from randlora_jax.targets import Selection


@dataclasses.dataclass(eq=False)
class LayerUpdates:
    """Interceptor that runs each module that holds scales with the updates added.

    Attributes:
      adapters: the active ones by name.
      deterministic: whether dropout is off.
      depth: length of the base's own path, where it is within another module.
      calls: what runs as the model's own.
      running: paths of modules whose method runs, with the updates, already.
    """

    adapters: Mapping[str, RandLoraConfig]
    parameters: Parameters
    bases: Bases
    deterministic: bool
    strategy: Strategy
    depth: int = 0
    calls: OurCall = dataclasses.field(default_factory=OurCall)
    running: set[trees.Path] = dataclasses.field(default_factory=set)

    def __call__(
        self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext
    ) -> Any:
        """One call of any module's method, as Flax hands it over."""
        module = context.module
        method = self.calls.method(context)
        if method is None or module.path in self.running or not self.adapters:
            return next_fun(*args, **kwargs)
        found = self._updates(module, method, args, kwargs)
        if not found:
            return next_fun(*args, **kwargs)
        function: Any = context.orig_method
        call = LinenCall(
            module, type(module), method, args, kwargs, function.func, next_fun, self.running
        )
        return updates.run(call, found, self.bases, self.strategy)

    def _updates(self, module: nn.Module, method: str, args, kwargs) -> list[updates.Update]:
        name = trees.dotted(module.path[self.depth :])
        config = next(iter(self.adapters.values()))
        kernels = adaptable(module, name, config, self.parameters, args, kwargs)
        own, found = module.variables["params"] if kernels else {}, []
        for kernel, target in kernels.items():
            if method != "__call__":
                kernel = _as_scaled(kernel, own)
            beside = own.get(kernel.label[0], {}) if kernel.label else own
            for adapter, config in self.adapters.items():
                names = [scale_name(scale, adapter) for scale in SCALES]
                if names[0] in beside:
                    lam, gamma = (nn.unbox(beside[name]) for name in names)
                    if lam.ndim > 2:
                        break  # the outside of a lifted layer, which comes again inside
                    dropout = self._dropout(module, config)
                    scales = lam, gamma
                    found.append(
                        updates.prepare(target, kernel, config, self.bases, scales, dropout)
                    )
                elif target == name and targets.selection(config, target) is Selection.YES:
                    raise ValueError(
                        f"{target!r} is one of target_modules but has no scales in 'randlora': "
                        "they are of another config or another model"
                    )
        return found

    def _dropout(self, module: nn.Module, config: RandLoraConfig) -> updates.Dropout | None:
        if self.deterministic or config.randlora_dropout == 0:
            return None
        layer: Any = nn.Dropout(config.randlora_dropout, deterministic=False, parent=None)
        return functools.partial(layer.apply, {}, rngs={"dropout": module.make_rng("dropout")})


def _as_scaled(kernel: Kernel, own: Mapping[str, Any]) -> Kernel:
    """The kernel as its scales have it: other methods than the call may not say how it is used."""
    for key in own:
        (*_, name), axes = parse_label((key,))
        if axes is not None and name == kernel.name:
            return dataclasses.replace(kernel, input_axes=axes)
    return kernel


@dataclasses.dataclass(frozen=True)
class LinenCall(updates.Call):
    """A call of a Linen module's method.

    Attributes:
      function: the method as it is written.
      next_fun: the same, bound, with what other interceptors make of it.
      running: paths of modules whose methods run as they are.
    """

    function: Callable[..., Any]
    next_fun: Callable[..., Any]
    running: set[trees.Path]

    def run(self) -> Any:
        with self._running():
            return self.next_fun(*self.args, **self.kwargs)

    def run_with_attributes(self, attributes: Mapping[str, Any]) -> Any:
        layer = self.layer.clone(parent=None, **attributes)
        own = self.layer.variables["params"]
        params = {name: leaf for name, leaf in own.items() if not is_scale(name)}
        return layer.apply({"params": params}, *self.args, **self.kwargs)

    def run_on(self, change: updates.Change, args: tuple[Any, ...]) -> Any:
        def changed(name, node):
            if isinstance(node, Mapping):
                return {key: changed("", child) for key, child in node.items()}
            return nn.meta.replace_boxed(node, change(name, nn.unbox(node)))

        def change_params(collections):
            params = {name: changed(name, node) for name, node in collections["params"].items()}
            return {**collections, "params": params}

        run = nn.map_variables(self.function, "params", trans_in_fn=change_params, mutable=False)
        with self._running():
            return run(self.layer, *args, **self.kwargs)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        self.running.add(self.layer.path)
        try:
            yield
        finally:
            self.running.discard(self.layer.path)
