"""The classes that an injected NNX model and its layers take.

An adapted module stays the object that it was, and gets a subclass of its own class, whose methods
compute with the updates; so does the root of the model, whose methods lend the bases to the layers.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from flax import nnx
from flax.nnx.transforms.compilation import JitWrapped
from jax.core import Tracer

from randlora_jax.nnx.discovery import original_class
from randlora_jax.nnx.layers import call
from randlora_jax.nnx.lending import LOAN, bases_of, lent
from randlora_jax.quantised import wrapped_by_qwix

# Operators that a layer can define to be used by.
_OPERATORS = ("__call__", "__getitem__", "__matmul__", "__rmatmul__")

# NNX calls these, and means the module as it is.
_NNX_CALLS = ("set_view", "_setattr")


@functools.cache
def adapted_class(cls: type[nnx.Module]) -> type[nnx.Module]:
    """The subclass whose methods compute with the updates: one for each class."""

    def updated(module, method, decorated, name, args, kwargs):
        del decorated
        return call(module, method, name, args, kwargs)

    return _subclass("RandLora" + cls.__name__, cls, updated, adapted_class)


@functools.cache
def root_class(cls: type[nnx.Module]) -> type[nnx.Module]:
    """The subclass whose public methods lend the bases to the layers."""

    def lending(root, method, decorated, name, args, kwargs):
        if wrapped_by_qwix(type(root)):
            raise ValueError(
                "qwix.quantize_model would take an adapter's factors for kernels: quantise the "
                "model at first, randlora_jax.nnx.quantize(model, qtype='int8'), and then inject"
            )
        _refuse_to_donate_twice(name, decorated)
        arrays = bases_of(root).values()
        ids = kwargs.pop("adapter_ids", None)
        with lent(root, shared=isinstance(decorated, JitWrapped), adapter_ids=ids) as stacked:
            result = method(root, *args, **kwargs)
        if stacked and any(not isinstance(a, Tracer) and a.is_deleted() for a in arrays):
            warnings.warn(
                f"the method {name!r} donates its model, whose stacks of layers make it compile "
                "anew for each call: write it as a function of the model, outside of the class",
                stacklevel=3,
            )
        return result

    return _subclass(cls.__name__ + "WithRandLora", cls, lending, root_class)


def _refuse_to_donate_twice(name: str, decorated: Any) -> None:
    """Raises a ValueError for a method that donates its model, where layers share no variables."""
    inner: Any = getattr(getattr(decorated, "jitted_fn", None), "__wrapped__", None)
    names, numbers = (getattr(inner, f"donate_arg{kind}", ()) for kind in ("names", "nums"))
    if 0 in numbers or "self" in names:
        raise ValueError(
            f"the method {name!r} donates its model without graph updates, where the bases that "
            "its layers share would be donated once for each: write it as a function of the "
            "model, `@nnx.jit(donate_argnums=0, ...)`, outside of the class"
        )


class _Ours:
    """What comes before a user's class in the order of methods, and is none of its bases.

    As a base it would give objects another layout, and they could not change their class.
    """

    __slots__ = ()
    randlora_class: ClassVar[Any]  # the user's, which each of ours has

    def __init_subclass__(cls, **options: Any) -> None:
        # A user's own, which may register subclasses or want arguments, is not told of ours.
        of_nnx: Any = nnx.Module.__init_subclass__
        of_nnx.__func__(cls, pytree=cls.randlora_class._pytree__is_pytree, **options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As the user's class does it, with the way to ours: no module holds it by its name.
        reduced = original_class(self).__reduce_ex__(self, protocol)
        derived = "randlora_maker" not in vars(type(self))  # from ours, by who knows where it is
        if derived or not isinstance(reduced, tuple):
            return reduced
        make, arguments, *state = reduced
        if state and isinstance(state[0], dict):  # a copy is lent its bases by its own root
            state[0] = {name: value for name, value in state[0].items() if name != LOAN}
        makers, cls = [], type(self)
        while cls is not original_class(self):
            makers.append(vars(cls)["randlora_maker"].__func__)
            cls = vars(cls)["randlora_class"]
        by_class = (_CLASS if argument is type(self) else argument for argument in arguments)
        return _unpickled, (cls, tuple(reversed(makers)), make, *by_class), *state


_CLASS = "the class of randlora_jax that the object had"  # among the arguments of what makes it


def _unpickled(cls, makers, make, *arguments):
    for maker in makers:
        cls = maker(cls)
    return make(*(cls if argument == _CLASS else argument for argument in arguments))


@functools.cache
def _metaclass(of_users: Any) -> Any:
    """The user's own, with `_Ours` before the classes that it would look at."""
    if hasattr(of_users, "randlora_metaclass"):
        return of_users

    def mro(cls):
        first, *bases = of_users.mro(cls)
        return [first, _Ours, *(base for base in bases if base is not _Ours)]

    members = {"mro": mro, "randlora_metaclass": True}
    return type("WithRandLora" + of_users.__name__, (of_users,), members)


def _subclass(name, cls, call, maker):
    private = maker is adapted_class  # methods, which only a layer's own class calls
    methods: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for key, value in () if base in (*nnx.Module.__mro__, _Ours) else vars(base).items():
            # A decorated method can be any descriptor: `nnx.jit` makes one of its own.
            method = callable(value) and hasattr(value, "__get__")
            method = method or isinstance(value, functools.partialmethod)
            method = method and not isinstance(value, (type, staticmethod))
            own = key in _OPERATORS if key.startswith("__") else private or key[0] != "_"
            if method and own and key not in _NNX_CALLS:
                methods[key] = _wrap(key, value, call)
            else:
                methods.pop(key, None)
    if not hasattr(cls, "set_view"):
        methods["set_view"] = _set_view
    methods |= {"__module__": cls.__module__, "randlora_class": cls}
    methods["randlora_maker"] = staticmethod(maker)
    meta: Any = type(cls)
    return _metaclass(meta)(name, (cls,), methods)


def _wrap(name, value, call):
    @functools.wraps(value, updated=())
    def method(self, *args, **kwargs):
        unbound = lambda module, *args, **kwargs: value.__get__(module, type(module))(
            *args, **kwargs
        )
        return call(self, unbound, value, name, args, kwargs)

    return method


def _set_view(self, deterministic: bool | None = None):
    if deterministic is not None and hasattr(self, "randlora_rngs"):
        self.deterministic = deterministic


def take_class(module: nnx.Module, *, adapted: bool, root: bool) -> None:
    """Gives an object the class that it has with updates of its own, at the root of a model."""
    cls: Any = original_class(module)
    cls = adapted_class(cls) if adapted else cls
    set_class(module, root_class(cls) if root else cls)  # the root lends before it is updated


def set_class(module: nnx.Module, cls: type[nnx.Module]) -> None:
    """Gives the object another class; NNX's own `__setattr__` would keep a record of it."""
    object.__setattr__(module, "__class__", cls)


@contextlib.contextmanager
def all_or_nothing(modules: Iterable[nnx.Module]) -> Iterator[None]:
    """Sets modules back to the classes and attributes that they had, if what is done here fails."""
    before = [(module, type(module), dict(vars(module))) for module in modules]
    try:
        yield
    except BaseException:
        for module, cls, attributes in before:
            set_class(module, cls)
            vars(module).clear()
            vars(module).update(attributes)
        raise
