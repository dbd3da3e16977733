"""A call of one layer, as a front end hands it over: what `updates` can have run, and on what."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from randlora_jax.ops.quantised import rounded_floats

# A parameter's new value, from its name in the module and its value. Parameters of submodules come
# too, by the name "", since nothing else of theirs matters here.
Change = Callable[[str, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Call(abc.ABC):
    """A call of one method of a module that holds adapted kernels, as a front end hands it over.

    Attributes:
      layer, cls: the module, and its class as the user wrote it.
      method: the name of the method.
      args, kwargs: of the call.
      quantised: the module's own quantised parameters by name, each a `qwix.QArray`.
    """

    layer: Any
    cls: type[Any]
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    quantised: Mapping[str, Any]

    def run(
        self,
        change: Change | None = None,
        *,
        attributes: Mapping[str, Any] = MappingProxyType({}),
        args: tuple[Any, ...] | None = None,
        beside: bool = False,
    ) -> Any:
        """The method of the module.

        Args:
          change: of its parameters; by default they are as they are.
          attributes: of a layer, in which it differs.
          args: in place of the call's own.
          beside: whether it runs a second time: then this is nothing that a user's tools should
            see.
        """
        return self._run(change, attributes, self.args if args is None else args, beside)

    @abc.abstractmethod
    def _run(
        self,
        change: Change | None,
        attributes: Mapping[str, Any],
        args: tuple[Any, ...],
        beside: bool,
    ) -> Any:
        """`run`, in a front end."""

    def run_on_floats(self) -> Any:
        """The method on the parameters as they are, floats in place of codes."""
        return self.run(as_floats if self.quantised else None)


def as_floats(name: str, value: Any) -> Any:
    """A module's own parameter as floats; what is a submodule's is this one's business."""
    return rounded_floats(value) if name else value
