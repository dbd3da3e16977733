"""How the bases, one pair at an injected model's root, reach the layers that compute with them.

A call of the root lends them to its layers, as attributes: so they are arguments of whatever
`nnx.jit` or `nnx.remat` comes between, whose caches would not notice that something closed over has
changed. A layer that is called otherwise, by a method that was bound before `inject` or in a
generator, knows its root, as long as it is no copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import flax
import jax
from flax import nnx

from randlora_jax import trees
from randlora_jax.bases import SCALING
from randlora_jax.nnx.discovery import modules_of, original_class
from randlora_jax.ops.rows import checked_ids

BASES = ("randlora_A", "randlora_B", "randlora_scale", SCALING)
IDS = "randlora_ids"  # lent with the bases, in a call with `adapter_ids`
LOAN = "randlora_bases"  # a layer's attribute, while its root is being called
STRENGTH = "randlora_strength"  # of an adapter, where it was set: `sites.scale_name` names it

Arrays = dict[str, jax.Array]
FLAX = tuple(int(part) for part in flax.__version__.split(".")[:3] if part.isdigit())


class RandLoraBasis(nnx.Variable[Any]):
    """Bases, strengths, and which layers of a stack have an update: saved, and never trained."""


# As the collection is called in Linen: so that it is what it is across Flax's bridges too.
nnx.register_variable_name("randlora_bases", RandLoraBasis, overwrite=True)


class ClosedOver:
    """What is lent in a graph's definition, to stacks: equal if it is the same arrays.

    NNX slices what is in a stack's state along its leading axis, which bases don't have. What is
    closed over, however, no cache of `nnx.jit` or `nnx.remat` knows of: in the definition they see
    it.
    """

    def __init__(self, arrays: Arrays):
        self.arrays = arrays

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClosedOver) and self._ids() == other._ids()

    def __hash__(self) -> int:
        return hash(self._ids())

    def _ids(self) -> frozenset[tuple[str, int]]:
        return frozenset((key, id(array)) for key, array in self.arrays.items())


def adapted_modules(root: nnx.Module) -> dict[trees.Path, Any]:
    """The modules with updates by their paths; those with a quantised kernel alone need no loan."""
    has_updates = lambda m: "randlora_layer" in vars(m) and m.randlora_layer.kernels
    return {path: m for path, m in modules_of(root).items() if has_updates(m)}


def bases_of(root: nnx.Module) -> Arrays:
    """The arrays at an injected model's root: its bases."""
    return {k: getattr(root, k).get_value() for k in BASES if k in vars(root)}


@contextlib.contextmanager
def lend_bases(model: nnx.Module, adapter_ids: Any = None) -> Iterator[None]:
    """Lets copies of a model's parts be called, as `nnx.jit` makes them of its arguments.

    The model's own methods do this already, and its parts need nothing where they are no copies.

    Args:
      model: an injected model.
      adapter_ids: integers, of the adapters of a table; see `randlora_jax.adapters.table`.

    Example:
      >>> from randlora_jax import RandLoraConfig
      >>> from randlora_jax.nnx import inject
      >>> config = RandLoraConfig(r=2, target_modules="all-linear")
      >>> model = inject(nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0))), config)
      >>> call = nnx.jit(lambda layer, x: layer(x))
      >>> with lend_bases(model):
      ...   call(model.layers[0], jax.numpy.ones(4)).shape
      (3,)
    """
    with lent(model, adapter_ids=adapter_ids):
        yield


@dataclasses.dataclass
class _Layer:
    """What is known of an adapted module besides its attributes.

    Attributes:
      itself: the module, which may not be hashable.
      root: of its model.
      users: how many calls it has the bases for: threads, and methods that call each other.
      before: what it had when the first of them began.
    """

    itself: weakref.ref[Any]
    root: weakref.ref[Any]
    users: int = 0
    before: Any = None


_layers: dict[int, _Layer] = {}  # by the module's id
_lock = threading.RLock()


@contextlib.contextmanager
def lent(root: nnx.Module, *, shared: bool = False, adapter_ids: Any = None) -> Iterator[bool]:
    """`lend_bases`; gives whether there is a stack among the layers.

    Args:
      root: the model.
      shared: whether the layers get the root's own variables, of which a transform that donates
        them finds one each; others refuse a variable that is in two places.
      adapter_ids: of the call; those of a call that this one is within are lent on.
    """
    variables = _variables_of(root)
    if adapter_ids is not None:
        ids = checked_ids(adapter_ids, bases_of(root))
        variables[IDS] = RandLoraBasis(ids)
    ours: list[tuple[Any, _Layer, Any]] = []
    try:
        with _lock:
            for module in adapted_modules(root).values():
                layer, found = settle(module, root), vars(module).get(LOAN)
                if layer.users == 0:
                    layer.before = found
                layer.users += 1
                ours.append((module, layer, found))
                _lend(module, {**_ids_in(found), **variables}, shared)
        yield any(isinstance(vars(module)[LOAN], ClosedOver) for module, *_ in ours)
    finally:
        with _lock:
            for module, layer, found in ours:
                layer.users -= 1
                if "randlora_layer" not in vars(module):
                    continue  # the call has merged or removed its adapters
                if layer.users == 0:
                    _put(module, layer.before)
                    layer.before = None
                elif found is not None:  # a call within another, which goes on with what it had
                    _put(module, found)


def lend_again(root: nnx.Module) -> None:
    """Lends what the root has now to layers that have a loan: bases and strengths can change."""
    variables = _variables_of(root)
    with _lock:
        for module in adapted_modules(root).values():
            if LOAN in vars(module):
                _lend(module, {**_ids_in(vars(module)[LOAN]), **variables}, shared=False)


def settle(module: Any, root: nnx.Module) -> _Layer:
    """Notes a module's root, for calls that don't come from it; it keeps the first that lives."""
    key, layer = id(module), _layers.get(id(module))
    if layer is None:
        layer = _Layer(weakref.ref(module, lambda _: _layers.pop(key, None)), weakref.ref(root))
        _layers[key] = layer
    elif layer.root() is None:
        layer.root = weakref.ref(root)
    return layer


def unsettle(module: Any) -> None:
    """Forgets a module's root."""
    _layers.pop(id(module), None)


def lent_to(module: Any) -> Arrays:
    """The bases, and the strengths that were set, for a module.

    Raises:
      RuntimeError: for a copy that was not lent any.
    """
    found = vars(module).get(LOAN)
    if isinstance(found, ClosedOver):
        return found.arrays
    if found is None:
        root = _layers[id(module)].root() if id(module) in _layers else None
        if root is None:
            raise RuntimeError(
                f"an adapted {original_class(module).__name__} was called outside of its model, "
                "which holds its bases: call the model or a public method of it, taken from it "
                "after inject, or do this within `with randlora_jax.nnx.lend_bases(model):`"
            )
        found = _variables_of(root)
    return {key: variable.get_value() for key, variable in found.items()}


def _variables_of(root: nnx.Module) -> dict[str, nnx.Variable[Any]]:
    return {k: v for k, v in vars(root).items() if k in BASES or k.partition(":")[0] == STRENGTH}


def _ids_in(loan: Any) -> dict[str, nnx.Variable[Any]]:
    """The numbers of adapters in a loan, which a call within the call needs too."""
    arrays = loan.arrays if isinstance(loan, ClosedOver) else loan or {}
    found = arrays.get(IDS)
    return {} if found is None else {IDS: RandLoraBasis(jax.numpy.asarray(found))}


def _lend(module: Any, variables: dict[str, nnx.Variable[Any]], shared: bool) -> None:
    kernels = module.randlora_layer.kernels
    stacked = any(getattr(module, kernel.name).ndim > len(kernel.shape) for kernel in kernels)
    value: Any
    if stacked:
        _refuse_lost_gradients()
        value = ClosedOver({key: variable.get_value() for key, variable in variables.items()})
    elif shared:
        value = dict(variables)
    else:  # variables of its own, on the same arrays: two layers can't share one in tree mode
        value = {key: RandLoraBasis(v.get_value()) for key, v in variables.items()}
    _put(module, value)


def _refuse_lost_gradients() -> None:
    """Raises a RuntimeError where Flax itself gives the layers of a stack gradients of zero."""
    if FLAX < (0, 12, 7) and not nnx.set_graph_mode.current_value():
        raise RuntimeError(
            f"flax {flax.__version__} loses the gradients of stacked layers in tree mode, adapted "
            "or not: install flax>=0.12.7, or call the model within `nnx.set_graph_mode(True)`"
        )


def _put(module: Any, loan: Any) -> None:
    """Sets a module's loan, or takes it away."""
    # A model that was closed over is of another trace, where NNX's `__setattr__` would refuse.
    attributes, nodes = vars(module), module._pytree__nodes
    if loan is not None:
        is_node = not isinstance(loan, ClosedOver)
        attributes.update({LOAN: loan, "_pytree__nodes": nodes.update({LOAN: is_node})})
    elif attributes.pop(LOAN, None) is not None:
        rest = {name: is_node for name, is_node in nodes.items() if name != LOAN}
        attributes["_pytree__nodes"] = type(nodes)(rest)
