"""What a call of a Linen model says: its method, its dropout, and which modules belong to it."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.core import freeze
from flax.linen.module import InterceptorContext

_FLAG = "randlora"
_numbers = itertools.count()


class OurCall:
    """An interceptor's mark on the modules of one call.

    An interceptor sees every module that runs meanwhile, also those of an `apply` within the model,
    whose paths start anew. Flax hands a scope's flags on to all scopes that are made from it, and
    to nothing else. `nn.jit` keeps them in its cache's key: so it traces anew for each mark, as it
    must, since it knows nothing of interceptors.
    """

    def __init__(self) -> None:
        self.number: int = next(_numbers)

    def marked(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call of a module, which then belongs to it with all its submodules."""

        def run(module, *args, **kwargs):
            self._mark(module)
            return call(module, *args, **kwargs)

        return run

    def _mark(self, module: nn.Module) -> None:
        assert module.scope is not None
        module.scope.flags = freeze({**module.scope.flags, _FLAG: self.number})
        # Submodules that are attributes by now have got their scopes already.
        for name, value in vars(module).items():
            for child in jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, nn.Module)):
                is_module = isinstance(child, nn.Module) and name != "parent"
                if is_module and child.scope is not None:
                    self._mark(child)

    def method(self, context: InterceptorContext) -> str | None:
        """The name of the method that runs, None if it is not one of our modules'."""
        scope, function = context.module.scope, getattr(context.orig_method, "func", None)
        if scope is None or scope.flags.get(_FLAG) != self.number:
            return None
        cls: Any = type(context.module)
        return _name_of(cls, function)


@functools.lru_cache(maxsize=4096)
def _name_of(cls: Any, function: Callable[..., Any]) -> str | None:
    """How a class calls its method, whatever decorates it; None for other functions, and `setup`.

    Flax runs a function that is lifted with a module, `nn.scan(function)`, as if it were a method.
    """
    function = inspect.unwrap(function)
    for base in cls.__mro__:
        for name, value in vars(base).items():
            if callable(value) and inspect.unwrap(value) is function:
                return None if name == "setup" else name
    return None


def unbound(base: nn.Module, method: str | Callable[..., Any] | None) -> Callable[..., Any]:
    """The base's method as a function of the module: by name, bound, or a function already."""
    name = "__call__" if method is None else method
    if not isinstance(name, str):
        return getattr(method, "__func__", name)
    if not callable(getattr(type(base), name, None)):
        raise ValueError(f"method={method!r} is none of {type(base).__name__}'s methods")
    return getattr(type(base), name)


def deterministic_of(
    call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The call's own word on `deterministic`, and the keywords that the base takes."""
    parameters = inspect.signature(call).parameters
    given, taken = kwargs.get("deterministic"), dict(kwargs)
    if "deterministic" in parameters:
        position = list(parameters).index("deterministic") - 1  # less the module itself
        if parameters["deterministic"].kind is inspect.Parameter.KEYWORD_ONLY:
            position = len(args)
        given = args[position] if 0 <= position < len(args) else given
    elif not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        taken.pop("deterministic", None)
    return given, taken
