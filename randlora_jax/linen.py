"""RandLoRA for Flax Linen: a wrapper that adapts the linear layers of any module it is given.

Inside the model the scales sit in `"params"` beside their kernel, the one place that survives
`nn.scan` and `nn.vmap` written with `variable_axes={"params": 0}`. Outside, the wrapper shows them
as the collection `"randlora"`, so that the base's parameters are what they were.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze

from randlora_jax import bases as bases_lib
from randlora_jax import merging, targets, trees
from randlora_jax.config import RandLoraConfig
from randlora_jax.dot_general import RandLoraDotGeneral, Strategy, check_shapes, prepare_scales

SCALES = ("randlora_lambda", "randlora_gamma")


class RandLora(nn.Module):
    """A module whose linear layers compute with `W + dW`; everything else is the base's.

    It is called like its base, has its base's parameter paths and initial values, and keeps what
    it adds in two collections: `"randlora"`, a `randlora_lambda` (r, n) and a `randlora_gamma`
    (n, min(in, out)) for each adapted kernel (with a leading axis under `nn.scan`), float32; and
    `"randlora_bases"`, `randlora_A` and `randlora_B`, once for all layers. `nn.Dense` and
    `nn.DenseGeneral` can be adapted.

    Attributes:
      base: the module to adapt; it stays as it is.
      config: what to adapt and how.
      deterministic: switches the adapter's dropout off, where the call does not say so. As for
        `nn.Dropout`, one of the two must, if `randlora_dropout` is not 0.
      strategy: "auto" picks the way with fewer operations for the number of tokens at hand;
        "merged" and "factored" force one.

    Raises:
      ValueError: for targets that match nothing or nothing linear, for missing collections and
        for shapes that don't fit, before anything is computed.

    Example:
      >>> model = RandLora(nn.Dense(3), RandLoraConfig(r=2, target_modules="all-linear"))
      >>> x = jnp.ones((1, 4))
      >>> params = nn.Dense(3).init(jax.random.key(0), x)["params"]
      >>> variables = model.adapt({"params": params}, x)
      >>> jax.tree.map(jnp.shape, variables["randlora"])
      {'randlora_gamma': (2, 3), 'randlora_lambda': (2, 2)}
      >>> bool((model.apply(variables, x) == nn.Dense(3).apply({"params": params}, x)).all())
      True
    """

    base: nn.Module
    config: RandLoraConfig
    deterministic: bool | None = None
    strategy: Strategy = "auto"

    def __post_init__(self):
        super().__post_init__()
        if self.scope is not None:
            nn.share_scope(self, self.base)  # no level of its own in the base's paths

    def __call__(self, *args, **kwargs):
        return self._run(None, *args, **kwargs)

    def apply(self, variables, *args, method=None, **kwargs):
        """`nn.Module.apply`; `method` is one of the base's: a name or a function of the base."""
        return super().apply(variables, *args, method=_entry(method), **kwargs)

    def init_with_output(self, rngs, *args, method=None, **kwargs):
        """`nn.Module.init_with_output`; `method` is one of the base's, as in `apply`."""
        return super().init_with_output(rngs, *args, method=_entry(method), **kwargs)

    def adapt(self, variables, *args, method=None, rngs=None, **kwargs) -> dict[str, Any]:
        """Adds scales and bases to a base's variables, of which no copy is made.

        The base is traced on the arguments, which can be `jax.ShapeDtypeStruct`s, and not run.

        Args:
          variables: the base's, `{"params": ...}`.
          *args, **kwargs: example inputs, as the base is called.
          method: the base's method to trace, `__call__` by default.
          rngs: only where the traced call needs them.

        Returns:
          The variables as given, with `"randlora"` and `"randlora_bases"` beside them.
        """
        variables = unfreeze(variables)
        if "params" not in variables:
            raise ValueError(
                f"variables has the collections {sorted(variables)} and no 'params': adapt takes "
                "the base's variables, {'params': ...}"
            )
        found, scales = _discover(self.base, self.config, variables, args, kwargs, method, rngs)
        dims = bases_lib.shared_dims([(k.in_features, k.out_features) for k in found.values()])
        return {
            **variables,
            "randlora": _initial_scales(self.config, found, scales),
            "randlora_bases": bases_lib.draw(self.config, *dims),
        }

    def merge(self, variables, *args, safe: bool = True, **kwargs) -> dict[str, Any]:
        """The base's parameters with the update folded in, for `base.apply({"params": ...})`.

        Computed in float32 and rounded once to each kernel's dtype; the given variables stay as
        they are, so that nothing needs to be unmerged.

        Args:
          variables: as `adapt` returned them, trained or not.
          *args, **kwargs: example inputs as for `adapt`, needed only where a kernel's shape does
            not tell which of its axes are inputs (an error says so).
          safe: refuse results that are not finite. It needs real values: no effect under `jit`.

        Raises:
          ValueError: naming the layer, if its merged kernel is not finite or nothing fits.
        """
        num_inputs = None
        if args or kwargs:
            base = {k: v for k, v in variables.items() if not k.startswith("randlora")}
            found, _ = _discover(self.base, self.config, base, args, kwargs)
            num_inputs = {path: kernel.num_inputs for path, kernel in found.items()}
        return merging.merge(variables, self.config, safe=safe, num_inputs=num_inputs)

    @nn.nowrap
    def _run(self, method, *args, **kwargs):
        call = _unbound(self.base, method)
        deterministic, kwargs = self._deterministic(call, args, kwargs)
        if self.is_initializing():
            y = call(self.base, *args, **_known(call, kwargs))
            if not self.scope.has_variable("randlora_bases", "randlora_A"):
                shapes = {k: v for k, v in self.base.variables.items() if k != "randlora"}
                added = self.clone(parent=None, base=self.base.clone(parent=None)).adapt(
                    shapes, *args, method=method, **kwargs
                )
                for collection in ("randlora", "randlora_bases"):
                    for name, value in added[collection].items():
                        self.scope.put_variable(collection, name, value)
            if self.config.init_weights:
                return y  # the update is zero
        bases = self.variables.get("randlora_bases")
        if not bases or "randlora" not in self.variables:
            raise ValueError(
                f"variables has the collections {sorted(self.variables)}, but an adapted model "
                "needs 'randlora' and 'randlora_bases' too: make them with adapt(variables, x)"
            )
        depth = len(self.base.path)

        def adapted(base, *args, **kwargs):
            interceptor = _Adapt(self.config, depth, dict(bases), deterministic, self.strategy)
            with nn.intercept_methods(interceptor):
                return call(base, *args, **kwargs)

        join = lambda target: {"params": trees.union(*(target.get(c, {}) for c in _MAPPED))}
        run = nn.map_variables(adapted, list(_MAPPED), trans_in_fn=join, mutable=False)
        return run(self.base, *args, **kwargs)

    @nn.nowrap
    def _deterministic(self, call, args, kwargs):
        """Whether dropout is off, and the keywords that the base takes."""
        try:
            bound = inspect.signature(call).bind_partial(self.base, *args, **_known(call, kwargs))
        except TypeError:  # the call itself will say what is wrong with the arguments
            bound = None
        if bound is not None:
            bound.apply_defaults()
        given = kwargs.get("deterministic", bound and bound.arguments.get("deterministic"))
        rest = _known(call, kwargs)
        if self.config.randlora_dropout == 0 or self.is_initializing():
            return True, rest
        if given is None and self.deterministic is None:
            raise ValueError(
                f"randlora_dropout={self.config.randlora_dropout} needs deterministic=True or "
                "False, in the call or in RandLora(..., deterministic=...)"
            )
        return self.deterministic if given is None else given, rest


_MAPPED = ("params", "randlora")


def _entry(method):
    return lambda module, *args, **kwargs: module._run(method, *args, **kwargs)


def _unbound(base: nn.Module, method) -> Callable:
    """The base's method as a function of the module: by name, bound, or a function already."""
    if method is None:
        method = "__call__"
    if isinstance(method, str):
        if not callable(getattr(type(base), method, None)):
            raise ValueError(f"method={method!r} is none of {type(base).__name__}'s methods")
        return getattr(type(base), method)
    return getattr(method, "__func__", method)


def _known(call, kwargs):
    """The keywords less `deterministic`, where the base has no such parameter."""
    parameters = inspect.signature(call).parameters
    takes = "deterministic" in parameters or any(
        p.kind is p.VAR_KEYWORD for p in parameters.values()
    )
    return kwargs if takes else {k: v for k, v in kwargs.items() if k != "deterministic"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What tracing the base told of one adapted kernel, as its layer sees it (unstacked)."""

    shape: tuple[int, ...]
    num_inputs: int
    dtype: Any

    @property
    def in_features(self) -> int:
        return math.prod(self.shape[: self.num_inputs])

    @property
    def out_features(self) -> int:
        return math.prod(self.shape[self.num_inputs :])


def _kernel_of(module: nn.Module) -> Kernel | None:
    """The module's kernel, if this is a layer that can be adapted."""
    if not isinstance(module, (nn.Dense, nn.DenseGeneral)):
        return None
    kernel = nn.unbox(module.variables["params"]["kernel"])
    inputs = 1
    if isinstance(module, nn.DenseGeneral):
        if module.batch_dims:
            raise ValueError(
                f"{targets.name_of(module.path)!r} is a DenseGeneral with batch_dims="
                f"{module.batch_dims}: give its name to exclude_modules"
            )
        inputs = 1 if isinstance(module.axis, int) else len(module.axis)
    return Kernel(kernel.shape, inputs, kernel.dtype)


class _Discover:
    """Interceptor that adds zero scales beside each target's kernel, and notes what it saw."""

    def __init__(self, config: RandLoraConfig):
        self.config = config
        self.modules: dict[str, tuple[type, bool]] = {}
        self.found: dict[tuple[str, ...], Kernel] = {}

    def __call__(self, next_fun, args, kwargs, context):
        module = context.module
        y = next_fun(*args, **kwargs)
        if context.method_name != "__call__":
            return y
        path = module.path
        name = targets.name_of(path)
        is_linear = isinstance(module, (nn.Dense, nn.DenseGeneral))
        self.modules.setdefault(name, (type(module), is_linear))
        wanted = targets.matches(self.config, name) and targets.in_layers(self.config, name)
        if not (is_linear and wanted) or module.has_variable("params", SCALES[0]):
            return y  # a lifted layer was seen inside already, a shared one at its first call
        kernel = self.found[path] = _kernel_of(module)
        small = min(kernel.in_features, kernel.out_features)
        n = bases_lib.num_bases(small, self.config.r)
        dtype = jnp.promote_types(kernel.dtype, jnp.float32)
        box = module.variables["params"]["kernel"]
        for label, shape in zip(SCALES, ((self.config.r, n), (n, small)), strict=True):
            value = functools.partial(_boxed, box, kernel, label, jnp.zeros(shape, dtype))
            module.scope.variable("params", label, value)
        return y


def _boxed(box, kernel: Kernel, label: str, value: jax.Array):
    """The scales in a box like the kernel's: gamma has the axis name of the side it scales."""
    if not isinstance(box, nn.Partitioned):
        return value
    inputs = kernel.in_features <= kernel.out_features
    names = box.names[: kernel.num_inputs] if inputs else box.names[kernel.num_inputs :]
    # Several axes are one in gamma: the first, which is the slowest, can still name it.
    name = names[0] if not any(names[1:]) else None
    return box.replace(value=value, names=(None, name if label == SCALES[1] else None))


def _discover(base, config, variables, args, kwargs, method=None, rngs=None):
    """Traces the base: {path: Kernel}, and the tree of scales' shapes as they are stored."""
    if config.fan_in_fan_out:
        warnings.warn(
            "fan_in_fan_out=True has no effect on nn.Dense and nn.DenseGeneral, whose kernels are "
            "(in, out)",
            stacklevel=3,
        )
    discover = _Discover(config)
    call = _unbound(base, method)
    kwargs = _known(call, kwargs)
    leaves, treedef = jax.tree.flatten((args, kwargs))
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def trace(variables, arrays):
        arrays = iter(arrays)
        whole = [next(arrays) if a else leaf for a, leaf in zip(is_array, leaves, strict=True)]
        args, kwargs = jax.tree.unflatten(treedef, whole)
        with nn.intercept_methods(discover):
            _, updated = base.apply(
                variables, *args, method=call, rngs=rngs, mutable=True, **kwargs
            )
        return updated["params"]

    arrays = [leaf for a, leaf in zip(is_array, leaves, strict=True) if a]
    params = jax.eval_shape(trace, variables, arrays)
    targets.check(config, discover.modules)
    scales = trees.select(params, lambda path, _: path[-1] in SCALES)
    return discover.found, scales


def _initial_scales(config: RandLoraConfig, found: dict[tuple[str, ...], Kernel], shapes):
    """PEFT's start: lambda 0 and gamma 1 / max of its shape; or lambda normal, gamma 1 / max."""

    def start(path, leaf):
        kernel = found[path[:-1]]
        struct = nn.unbox(leaf)
        shape, dtype = struct.shape, struct.dtype
        if path[-1] == SCALES[1]:
            large = max(kernel.in_features, kernel.out_features)
            sides = (*struct.shape[-1:], bases_lib.num_bases(struct.shape[-1], config.r))
            value = jnp.full(shape, 1 / (max(sides) if config.init_weights else large), dtype)
        elif config.init_weights:
            value = jnp.zeros(shape, dtype)
        else:
            key = trees.key_of(config.projection_prng_key, path)
            value = jax.random.normal(key, shape, dtype)
        return leaf.replace_boxed(value) if isinstance(leaf, nn.meta.AxisMetadata) else value

    return trees.map_with_path(start, shapes)


class _Adapt:
    """Interceptor that runs each layer that has scales with an adapted `dot_general`."""

    def __init__(self, config, depth, bases, deterministic, strategy):
        self.config, self.depth, self.bases = config, depth, bases
        self.deterministic, self.strategy = deterministic, strategy
        self.within = False

    def __call__(self, next_fun, args, kwargs, context):
        module = context.module
        linear = isinstance(module, (nn.Dense, nn.DenseGeneral))
        if self.within or context.method_name != "__call__" or not linear:
            return next_fun(*args, **kwargs)
        path = module.path[self.depth :]
        name = targets.name_of(path)
        params = dict(module.variables["params"])
        if SCALES[0] not in params:
            wanted = targets.matches(self.config, name) and targets.in_layers(self.config, name)
            if wanted:
                raise ValueError(
                    f"{name!r} is one of target_modules but has no scales in 'randlora': they are "
                    "from another config or another model"
                )
            return next_fun(*args, **kwargs)
        scales = tuple(nn.unbox(params.pop(label)) for label in SCALES)
        if scales[0].ndim > 2:  # the outside of a lifted layer, which comes again inside
            return next_fun(*args, **kwargs)
        kernel = _kernel_of(module)
        try:
            check_shapes(self.bases, scales, kernel.in_features, kernel.out_features)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        adapted = RandLoraDotGeneral(
            self.bases,
            (prepare_scales(self.bases, scales, self.config.scaling),),
            self._dropout(module),
            self.strategy,
            module.dot_general_cls() if module.dot_general_cls else module.dot_general,
        )
        layer = module.clone(parent=None, dot_general=adapted, dot_general_cls=None)
        with self._inside():
            return layer.apply({"params": params}, *args, **kwargs)

    def _dropout(self, module):
        if self.deterministic:
            return None
        layer = nn.Dropout(self.config.randlora_dropout, deterministic=False, parent=None)
        rngs = {"dropout": module.make_rng("dropout")}
        return lambda x: layer.apply({}, x, rngs=rngs)

    @contextlib.contextmanager
    def _inside(self):
        # The layer's own call, and what it is made of, come through here too.
        self.within = True
        try:
            yield
        finally:
            self.within = False
