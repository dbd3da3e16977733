"""What a call of a Linen model says and shows: its method, its dropout, its layers."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable

import flax.linen as nn
import jax

from randlora_jax import adapters, targets, trees
from randlora_jax.kernels import SCALES, Kernel, parse_label
from randlora_jax.linen.interception import Discover


def discover(base, config, parameters, variables, args, kwargs, method=None, rngs=None):
    """Traces the base: {path of scales: Kernel}, and the scales' shapes as they are stored."""
    seen = Discover(config, parameters)
    call = unbound(base, method)
    _, kwargs = deterministic_of(call, args, kwargs)
    leaves, treedef = jax.tree.flatten((args, kwargs))
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    arrays = [leaf for a, leaf in zip(is_array, leaves, strict=True) if a]

    def trace(arrays):
        arrays = iter(arrays)
        whole = [next(arrays) if a else leaf for a, leaf in zip(is_array, leaves, strict=True)]
        args, kwargs = jax.tree.unflatten(treedef, whole)
        # As init does, of which every model is capable: a cache is made and not used up. The
        # key stands in for any other that is missing, and nothing is drawn from it.
        keys = {"params": jax.random.key(0), **(rngs or {})}
        with nn.intercept_methods(seen):
            return base.init(keys, *args, method=traced_anew(call), mutable=True, **kwargs)[
                "params"
            ]

    params = jax.eval_shape(trace, arrays)
    targets.check(config, seen.modules)
    if config.fan_in_fan_out and all(k.input_axes != (1,) for k in seen.found.values()):
        warnings.warn(
            "fan_in_fan_out=True has no effect here: no target stores its kernel (out, in)",
            stacklevel=3,
        )
    check_params(dict(trees.items(variables["params"])), params, seen.found)
    shapes = trees.select(params, lambda path, _: path[-1] in SCALES)
    boxed = any(isinstance(v, nn.meta.AxisMetadata) for _, v in trees.items(variables["params"]))
    return adapters.cut_stacks(seen.found, shapes if boxed else nn.unbox(shapes), config)


_calls = itertools.count()


def traced_anew(call):
    """The call with a cache of its own for `nn.jit`, which knows nothing of interceptors."""

    def fresh(module, *args, **kwargs):
        module.scope.flags = {**module.scope.flags, "randlora": next(_calls)}
        return call(module, *args, **kwargs)

    return fresh


def is_scale(name: str) -> bool:
    return name.split(":")[0] in SCALES


def passed_on(next_fun, args, kwargs, context):
    return next_fun(*args, **kwargs)


def check_params(given, traced: trees.Tree, found: dict[trees.Path, Kernel]):
    """Raises a ValueError where the parameters are not those of the model that was traced."""
    shapes = dict(trees.items(traced))
    for path in found:
        where = parse_label(path)[0]
        name, wanted = ".".join(where), nn.unbox(shapes[where]).shape
        if where not in given:
            raise ValueError(f"'params' has no {name!r}: it is of another model")
        if nn.unbox(given[where]).shape != wanted:
            raise ValueError(
                f"'params' has a {name!r} of {nn.unbox(given[where]).shape}, but the model has "
                f"{wanted}: it is of another model"
            )


def unbound(base: nn.Module, method) -> Callable:
    """The base's method as a function of the module: by name, bound, or a function already."""
    name = "__call__" if method is None else method
    if not isinstance(name, str):
        return getattr(method, "__func__", method)
    if not callable(getattr(type(base), name, None)):
        raise ValueError(f"method={method!r} is none of {type(base).__name__}'s methods")
    return getattr(type(base), name)


def deterministic_of(call, args, kwargs):
    """The call's own word on `deterministic`, and the keywords that the base takes."""
    parameters = inspect.signature(call).parameters
    given = kwargs.get("deterministic")
    if "deterministic" in parameters:
        position = list(parameters).index("deterministic") - 1  # less the module itself
        if parameters["deterministic"].kind is inspect.Parameter.KEYWORD_ONLY:
            position = len(args)
        given = args[position] if 0 <= position < len(args) else given
    elif not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        kwargs = {k: v for k, v in kwargs.items() if k != "deterministic"}
    return given, kwargs
