"""A call of a Linen module's method: as it is, on changed parameters, or with other attributes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn

from randlora_jax import trees
from randlora_jax.layer_call import Call, Change
from randlora_jax.linen.calls import unseen

Running = set[tuple[trees.Path, str]]  # modules' paths, and kernels that have their update by now


@dataclasses.dataclass(frozen=True)
class LinenCall(Call):
    """A call of a Linen module's method.

    Attributes:
      function: the method as it is written.
      next_fun: the same, bound, with what other interceptors make of it.
      interceptor: ours, which has the call.
      running, taken: what has its update by now, to which the call adds its kernels.
    """

    function: Callable[..., Any]
    next_fun: Callable[..., Any]
    interceptor: Any
    running: Running
    taken: Running

    def _run(self, change, attributes, args, beside):
        with self._running(), self._with_attributes(attributes):
            if change is not None:
                return self._run_on(change, args, beside)
            return self.next_fun(*args, **self.kwargs)

    @contextlib.contextmanager
    def _with_attributes(self, attributes: Mapping[str, Any]) -> Iterator[None]:
        # The module of this call alone, as Flax made it for its scope: nobody else sees it so.
        before = {name: getattr(self.layer, name) for name in attributes}
        try:
            for name, value in attributes.items():
                object.__setattr__(self.layer, name, value)
            yield
        finally:
            for name, value in before.items():
                object.__setattr__(self.layer, name, value)

    def _run_on(self, change: Change, args: tuple[Any, ...], beside: bool) -> Any:
        def changed(name, node):
            if isinstance(node, Mapping):
                return {key: changed("", child) for key, child in node.items()}
            return trees.replaced(node, change(name, trees.unboxed(node)))

        def change_params(collections):
            params = {name: changed(name, node) for name, node in collections["params"].items()}
            return {**collections, "params": params}

        with unseen(None if beside else self.interceptor) as seen:
            # Flax takes the method under a transform for another call of it.
            function = self.function if beside else seen(self.function)
            run = nn.map_variables(function, "params", trans_in_fn=change_params, mutable=False)
            return run(self.layer, *args, **self.kwargs)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        self.running.update(self.taken)
        try:
            yield
        finally:
            self.running.difference_update(self.taken)
