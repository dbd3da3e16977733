"""What a call of a Linen model says: its method, its dropout, and which modules belong to it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
from flax.core import freeze
from flax.linen.module import InterceptorContext, _context
from flax.linen.module import _global_interceptor_stack as _interceptors

_numbers = itertools.count()


class OurCall:
    """An interceptor's mark on the modules of one call.

    An interceptor sees every module that runs meanwhile, also those of an `apply` within the model,
    whose paths start anew. Flax hands a scope's flags on to all scopes that are made from it, and
    to nothing else. `nn.jit` keeps them in its cache's key: so it traces anew for each mark, as it
    must, since it knows nothing of interceptors.
    """

    def __init__(self) -> None:
        # A flag of its own: a call can be within another one of ours.
        self.flag: str = f"randlora_{next(_numbers)}"

    def marked(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call of a module, which then belongs to it with all its submodules."""

        def run(module, *args, **kwargs):
            for one in _bound_modules(module, set()):
                one.scope.flags = freeze({**one.scope.flags, self.flag: True})
            return call(module, *args, **kwargs)

        return run

    def has(self, module: nn.Module) -> bool:
        """Whether a module belongs to it."""
        return module.scope is not None and self.flag in module.scope.flags


def method_of(context: InterceptorContext) -> str | None:
    """How the module's class calls the method that runs; None for other functions, and `setup`.

    Flax runs a function that is lifted with a module, `nn.scan(function)`, as if it were a method.
    """
    cls: Any = type(context.module)
    return _name_of(cls, getattr(context.orig_method, "func", None))


@functools.lru_cache(maxsize=4096)
def is_lifted(cls: Any, method: str) -> bool:
    """Whether a class is a transformed one, as `nn.vmap(nn.Dense)`, whose method runs inside."""
    function, inner = vars(cls).get(method), getattr(cls.__mro__[1], method, None)
    while function is not None and function is not inner:
        function = getattr(function, "__wrapped__", None)
    return function is not None


@contextlib.contextmanager
def unseen(ours: Any = None) -> Iterator[Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """What runs in here, no interceptor sees, and it is not among the captured intermediates.

    What we run in place of a call, or beside it, is nothing of the user's: an interceptor would do
    twice what it does. What the yielded decorator is given, is seen as ever.

    Args:
      ours: our interceptor, if what runs stands for a call that it has: those that came after it,
        which have not seen that call yet, do see this one.
    """
    hidden: list[Any] = []

    def hide():
        later = []
        while _interceptors:
            hidden.append(_interceptors.pop())
            if hidden[-1] is ours:
                later = hidden[:-1]
                del hidden[:-1]
        for interceptor in reversed(later):
            _interceptors.push(interceptor)
        _context.capture_stack.append(None)

    def show():
        later = []
        while _interceptors:
            later.append(_interceptors.pop())
        for interceptor in (*reversed(hidden), *reversed(later)):
            _interceptors.push(interceptor)
        hidden.clear()
        _context.capture_stack.pop()

    def seen(function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            show()
            try:
                return function(*args, **kwargs)
            finally:
                hide()

        return run

    hide()
    try:
        yield seen
    finally:
        show()


def _bound_modules(value: Any, seen: set[int]) -> Iterator[Any]:
    """A module and those that are its attributes by now, which have their scopes already."""
    if id(value) in seen:
        return
    seen.add(id(value))
    children: Iterable[Any] = ()
    if isinstance(value, nn.Module):
        if value.scope is not None:
            yield value
            children = (v for name, v in vars(value).items() if name != "parent")
    elif isinstance(value, Mapping):
        children = value.values()
    elif isinstance(value, (list, tuple)):
        children = value
    for child in children:
        yield from _bound_modules(child, seen)


@functools.lru_cache(maxsize=4096)
def _name_of(cls: Any, function: Callable[..., Any]) -> str | None:
    """How a class calls its method, whatever decorates it."""
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
