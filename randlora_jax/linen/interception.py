"""How a Linen model is reached from outside: interceptors that find and adapt its layers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from randlora_jax import targets, trees
from randlora_jax.bases import Bases
from randlora_jax.config import RandLoraConfig
from randlora_jax.dot_general import (
    RandLoraDotGeneral,
    Scales,
    Strategy,
    check_shapes,
    delta_weight,
    prepare_scales,
)
from randlora_jax.kernels import SCALES, Kernel, wide
from randlora_jax.layers import Rule, plain_input, register_layer, rule_for


def _dense_axes(layer, shape, args, kwargs):
    del shape, args, kwargs
    if getattr(layer, "batch_dims", ()):
        raise ValueError(
            f"a DenseGeneral with batch_dims={layer.batch_dims} is no map by one kernel: give its "
            "name to exclude_modules"
        )
    axis = getattr(layer, "axis", -1)
    return tuple(range(1 if isinstance(axis, int) else len(axis)))


register_layer(nn.Dense, input_axes=_dense_axes, dot_general=True)
register_layer(nn.DenseGeneral, input_axes=_dense_axes, dot_general=True)
register_layer(nn.Einsum, plain=True)

Parameters = Mapping[str, tuple[int, ...]]  # raw parameters by path, with their input axes


def adaptable(module: nn.Module, name: str, args, kwargs, config, parameters: Parameters):
    """{target's name: its Kernel} of the kernels that this module holds itself."""
    own = module.variables.get("params", {})
    found = {}
    rule = rule_for(module)
    if rule is not None and rule.kernel in own:
        value = nn.unbox(own[rule.kernel])
        try:
            found[name] = rule.describe(module, value, args, kwargs, config.fan_in_fan_out)
        except ValueError as error:
            if targets.wanted(config, name) is not False:
                raise ValueError(f"{name!r}: {error}") from None
    for label, leaf in own.items():
        path = f"{name}.{label}" if name else label
        for pattern, axes in parameters.items():
            if isinstance(leaf, Mapping) or not targets.hits((pattern,), path):
                continue
            value = nn.unbox(leaf)
            found[path] = Kernel(tuple(value.shape), tuple(axes), label, value.dtype)
    return found


class Discover:
    """Interceptor that adds zero scales beside each target's kernel, and notes what it saw."""

    def __init__(self, config: RandLoraConfig, parameters: Parameters):
        self.config, self.parameters = config, parameters
        self.modules: dict[str, tuple[type, bool]] = {}
        self.found: dict[trees.Path, Kernel] = {}
        self.mapping: list[str] = []  # what we are within, of the layers that map parameters

    def __call__(self, next_fun, args, kwargs, context):
        module = context.module
        maps = isinstance(module, (nn.WeightNorm, nn.SpectralNorm))
        self.mapping += [type(module).__name__] * maps
        y = next_fun(*args, **kwargs)
        if maps:
            self.mapping.pop()
        if context.method_name != "__call__":
            return y
        name = targets.name_of(module.path)
        kernels = adaptable(module, name, args, kwargs, self.config, self.parameters)
        self.modules.setdefault(name, (type(module), rule_for(module) is not None))
        for target, kernel in kernels.items():
            self.modules[target] = (type(module), True)
            explicit = target != name  # a raw parameter is asked for by its path already
            if explicit or targets.wanted(self.config, target) is not False:
                self._add_scales(module, kernel)
        return y

    def _add_scales(self, module, kernel: Kernel):
        own = module.variables["params"]
        label = kernel.label
        if (label[0] if label else SCALES[0]) in own:
            return  # a lifted layer was seen inside already, a shared one at its first call
        if self.mapping:
            raise ValueError(
                f"{targets.name_of(module.path)!r} is within a {self.mapping[-1]}, which would "
                "change its scales too: give its name to exclude_modules"
            )
        self.found[(*module.path, *label)] = kernel
        dtype = wide(kernel.dtype)
        scales = {
            scale: _boxed(own[kernel.name], kernel, scale, jnp.zeros(shape, dtype))
            for scale, shape in zip(SCALES, kernel.scale_shapes(self.config.r), strict=True)
        }
        for key, value in ({label[0]: scales} if label else scales).items():
            # Not scope.param, which would draw a key and so change the base's initial values.
            module.scope.variable("params", key, lambda value=value: value)


def _boxed(box, kernel: Kernel, scale: str, value):
    """The scales in a box like the kernel's: gamma has the axis name of the side it scales."""
    if not isinstance(box, nn.Partitioned):
        return value
    small = kernel.input_axes if kernel.in_features <= kernel.out_features else kernel.output_axes
    names = [box.names[i] for i in small]
    # Several axes are one in gamma: the first, which is the slowest, can still name it.
    name = names[0] if not any(names[1:]) else None
    return box.replace(value=value, names=(None, name if scale == SCALES[1] else None))


class Adapt:
    """Interceptor that runs each kernel that has scales with the update added.

    Attributes:
      adapters: (config, suffix of the scales' names) of each active adapter.
      depth: length of the base's own path, where it is within another module.
    """

    def __init__(
        self,
        adapters: Sequence[tuple[RandLoraConfig, str]],
        parameters: Parameters,
        bases: Bases,
        deterministic: bool,
        strategy: Strategy,
    ):
        self.adapters, self.parameters, self.depth = adapters, parameters, 0
        self.bases, self.deterministic, self.strategy = bases, deterministic, strategy
        self.within = False
        self.entered: set[trees.Path] = set()

    def __call__(self, next_fun, args, kwargs, context):
        module = context.module
        if self.within or context.method_name != "__call__" or module.path in self.entered:
            return next_fun(*args, **kwargs)
        name = targets.name_of(module.path[self.depth :])
        config = self.adapters[0][0]
        kernels = adaptable(module, name, args, kwargs, config, self.parameters)
        updates = {}
        for target, kernel in kernels.items():
            scales = self._scales(module, target, kernel, explicit=target != name)
            if scales:
                updates[target] = kernel, scales
        if not updates:
            return next_fun(*args, **kwargs)
        rule = rule_for(module)
        if list(updates) == [name] and rule is not None and rule.dot_general:
            used, y = self._through_dot_general(module, rule, *updates[name], args, kwargs)
            if used:
                return y
        return self._through_kernels(module, next_fun, updates, args, kwargs, context)

    def _scales(self, module, target, kernel, explicit) -> list[tuple[RandLoraConfig, Scales]]:
        own = module.variables["params"]
        inner = own.get(kernel.label[0], {}) if kernel.label else own
        found = []
        for config, suffix in self.adapters:
            if SCALES[0] + suffix in inner:
                scales = tuple(nn.unbox(inner[s + suffix]) for s in SCALES)
                if scales[0].ndim > 2:
                    return []  # the outside of a lifted layer, which comes again inside
                try:
                    check_shapes(self.bases, [s.shape for s in scales], *kernel.sides)
                except ValueError as error:
                    raise ValueError(f"{target!r}: {error}") from None
                found.append((config, prepare_scales(self.bases, scales, config.scaling)))
            elif not explicit and targets.wanted(config, target) is True:
                raise ValueError(
                    f"{target!r} is one of target_modules but has no scales in 'randlora': they "
                    "are of another config or another model"
                )
        return found

    def _through_dot_general(self, module, rule: Rule, kernel, updates, args, kwargs):
        """Runs a layer with an adapted `dot_general`, if it turns out to use it."""
        own_dot = module.dot_general_cls() if module.dot_general_cls else module.dot_general
        adapted = RandLoraDotGeneral(
            self.bases,
            [scales for _, scales in updates],
            [self._dropout(module, config) for config, _ in updates],
            self.strategy,
            own_dot,
        )
        used = []

        def dot_general(*args, **kwargs):
            used.append(True)
            return adapted(*args, **kwargs)

        layer = module.clone(parent=None, dot_general=dot_general, dot_general_cls=None)
        own = module.variables["params"]
        params = {k: v for k, v in own.items() if not k.startswith("randlora_")}
        self.within = True  # the layer's own call, and what it is made of, come through here too
        try:
            y = layer.apply({"params": params}, *args, **kwargs)
        finally:
            self.within = False
        return bool(used), y

    def _through_kernels(self, module, next_fun, updates, args, kwargs, context):
        """Runs a module on kernels with the updates added, where it can't be told of a product."""
        call = getattr(type(module), context.method_name)
        every = [(k, config, scales) for k, found in updates.values() for config, scales in found]
        dropouts = [self._dropout(module, config) for _, config, _ in every]
        kernel = every[0][0]
        plain = plain_input(type(module), module, kernel, args, kwargs)
        if plain is not None and len(updates) == 1:
            scales = [scales for _, _, scales in every]
            operation = RandLoraDotGeneral(self.bases, scales, dropouts, self.strategy)
            if operation.is_better_beside(*plain, kernel):
                y = next_fun(*args, **kwargs)
                return y + operation.update(*plain, kernel).astype(y.dtype)
        deltas = [(kernel, self._delta(kernel, scales)) for kernel, _, scales in every]
        if not any(dropouts):
            return self._on_params(module, call, functools.partial(_add, deltas), args, kwargs)
        if rule_for(module) is None:
            raise ValueError(
                f"randlora_dropout={every[0][1].randlora_dropout} has no input to act on at the "
                f"raw parameter {next(iter(updates))!r}: set it to 0, or deterministic=True"
            )
        y = next_fun(*args, **kwargs)
        for (kernel, delta), dropout in zip(deltas, dropouts, strict=True):
            drop = lambda x, dropout=dropout: dropout(x) if dropout and hasattr(x, "ndim") else x
            only = functools.partial(_only, kernel, delta)
            y = y + self._on_params(module, call, only, tuple(map(drop, args)), kwargs)
        return y

    def _on_params(self, module, call, change, args, kwargs):
        change_params = lambda collections: {**collections, "params": change(collections["params"])}
        run = nn.map_variables(call, "params", trans_in_fn=change_params, mutable=False)
        with self._entering(module.path):
            return run(module, *args, **kwargs)

    def _delta(self, kernel: Kernel, scales: Scales):
        A, B = self.bases["randlora_A"], self.bases["randlora_B"]
        return delta_weight(A, B, *scales, *kernel.sides, 1.0)

    def _dropout(self, module, config):
        if self.deterministic or config.randlora_dropout == 0:
            return None
        layer = nn.Dropout(config.randlora_dropout, deterministic=False, parent=None)
        rngs = {"dropout": module.make_rng("dropout")}
        return functools.partial(layer.apply, {}, rngs=rngs)

    @contextlib.contextmanager
    def _entering(self, path):
        self.entered.add(path)
        try:
            yield
        finally:
            self.entered.discard(path)


def _add(deltas, params):
    """Parameters with the updates, (in, out) matrices, added to their kernels."""
    sums = {}
    for kernel, delta in deltas:
        sums[kernel] = sums[kernel] + delta if kernel in sums else delta
    changed = {}
    for kernel, delta in sums.items():
        box = params[kernel.name]
        changed[kernel.name] = nn.meta.replace_boxed(box, kernel.add(nn.unbox(box), delta))
    return {**params, **changed}


def _only(kernel, delta, params):
    """An update in its kernel's place, and zero for all other parameters."""
    params = jax.tree.map(jnp.zeros_like, dict(params))
    box = params[kernel.name]
    value = kernel.add(nn.unbox(box), delta)
    return {**params, kernel.name: nn.meta.replace_boxed(box, value)}
