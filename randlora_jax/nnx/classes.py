"""The classes that an injected NNX model and its layers take, and how the bases reach the layers.

An adapted module stays the object that it was, and gets a subclass of its own class. The bases are
kept once, at the root. A call of the root lends them to its layers, as attributes: so they are
arguments of whatever `nnx.jit` or `nnx.remat` comes between, whose caches would not notice that
something closed over has changed.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

from flax import nnx

from randlora_jax import trees
from randlora_jax.bases import Bases
from randlora_jax.nnx.discovery import modules_of
from randlora_jax.nnx.layers import BASES, ClosedOver, RandLoraBasis, call

# Operators that a layer can define to be used by.
_OPERATORS = ("__call__", "__getitem__", "__matmul__", "__rmatmul__")


@functools.cache
def adapted_class(cls: type[nnx.Module]) -> type[nnx.Module]:
    """The subclass whose methods compute with the updates: one for each class."""
    return _subclass("RandLora" + cls.__name__, cls, call, private=True)


@functools.cache
def root_class(cls: type[nnx.Module]) -> type[nnx.Module]:
    """The subclass whose public methods lend the bases to the layers."""

    def lending(root, method, name, args, kwargs):
        del name
        with lend_bases(root):
            return method(root, *args, **kwargs)

    return _subclass(cls.__name__ + "WithRandLora", cls, lending, private=False)


def _subclass(name, cls, call, private):
    methods = {}
    for base in reversed(cls.__mro__):
        for key, value in () if base in nnx.Module.__mro__ else vars(base).items():
            # A decorated method can be any descriptor: `nnx.jit` makes one of its own.
            method = callable(value) and hasattr(value, "__get__")
            method = method or isinstance(value, functools.partialmethod)
            method = method and not isinstance(value, (type, staticmethod))
            own = key in _OPERATORS if key.startswith("__") else private or key[0] != "_"
            if method and own and key != "set_view":
                methods[key] = _wrap(key, value, call)
            else:
                methods.pop(key, None)
    if not hasattr(cls, "set_view"):
        methods["set_view"] = _set_view
    methods |= {"__module__": cls.__module__, "randlora_class": cls}
    return type(cls)(name, (cls,), methods, pytree=cls._pytree__is_pytree)


def _wrap(name, value, call):
    @functools.wraps(value, updated=())
    def method(self, *args, **kwargs):
        unbound = lambda module, *args, **kwargs: value.__get__(module)(*args, **kwargs)
        return call(self, unbound, name, args, kwargs)

    return method


def _set_view(self, deterministic: bool | None = None):
    if deterministic is not None and hasattr(self, "randlora_rngs"):
        self.deterministic = deterministic


def set_class(module: nnx.Module, cls: type[nnx.Module]) -> None:
    """Gives the object another class; NNX's own `__setattr__` would keep a record of it."""
    object.__setattr__(module, "__class__", cls)


def adapted_modules(root: nnx.Module) -> dict[trees.Path, Any]:
    """The modules with updates by their paths."""
    return {path: m for path, m in modules_of(root).items() if "randlora_layer" in vars(m)}


@contextlib.contextmanager
def lend_bases(model: nnx.Module) -> Iterator[None]:
    """Lets parts of an injected model be called by themselves; its own methods do this already.

    Example:
      >>> import jax
      >>> from randlora_jax import RandLoraConfig
      >>> from randlora_jax.nnx import inject
      >>> config = RandLoraConfig(r=2, target_modules="all-linear")
      >>> model = inject(nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0))), config)
      >>> with lend_bases(model):
      ...   model.layers[0](jax.numpy.ones(4)).shape
      (3,)
    """
    arrays, lent = bases_of(model), []
    with _lock:
        for module in adapted_modules(model).values():
            users = _users.get(id(module), 0)
            if users == 0 and "randlora_bases" in vars(module):
                continue  # the copy of a layer within `nnx.jit`: it came with them
            if users == 0:
                _lend(module, arrays)
            _users[id(module)] = users + 1
            lent.append(module)
    try:
        yield
    finally:
        with _lock:
            for module in lent:
                _users[id(module)] -= 1
                if _users[id(module)] == 0:
                    del _users[id(module)]
                    del module.randlora_bases


# How many calls an adapted module has the bases for: threads, and methods that call each other.
_users: dict[int, int] = {}
_lock = threading.Lock()


def _lend(module: Any, arrays: Bases) -> None:
    kernels = module.randlora_layer.kernels
    stacked = any(getattr(module, kernel.name).ndim > len(kernel.shape) for kernel in kernels)
    value: Any = ClosedOver(arrays)
    if not stacked:
        # Variables of its own, on the same arrays: two layers can't share one in tree mode.
        value = {key: RandLoraBasis(array) for key, array in arrays.items()}
    # A model that was closed over is of another trace, where NNX's `__setattr__` would refuse.
    nodes = module._pytree__nodes.update({"randlora_bases": not stacked})
    vars(module).update(randlora_bases=value, _pytree__nodes=nodes)


def bases_of(root: nnx.Module) -> Bases:
    """The arrays at an injected model's root: its bases."""
    return {k: getattr(root, k).get_value() for k in BASES if k in vars(root)}
