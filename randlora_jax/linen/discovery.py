"""Which kernels of a Linen model are to be adapted, and how they are stored: by tracing it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext

from randlora_jax import targets, trees
from randlora_jax.config import RandLoraConfig
from randlora_jax.equations import KernelAxes
from randlora_jax.left_out import Seen, may_be_kernels
from randlora_jax.linen.calls import OurCall, deterministic_of, method_of, unbound
from randlora_jax.raw_parameters import Parameters, check_parameters, raw_kernels
from randlora_jax.registry import (
    Arguments,
    LayerRule,
    add_no_linear_layer,
    add_rule,
    check_has_kernel,
    check_orientation,
    rule_for,
)
from randlora_jax.sites import LAMBDA, SCALES, Kernel, Shape, Site, Stack
from randlora_jax.stacks import select_layers
from randlora_jax.stored import stack_axes
from randlora_jax.targets import Selection


def _dense_general(layer: Any) -> dict[str, KernelAxes]:
    stacked, inputs = len(layer.batch_dims), 1 if isinstance(layer.axis, int) else len(layer.axis)
    axes = KernelAxes(tuple(range(stacked)), tuple(range(stacked, stacked + inputs)))
    return {"kernel": axes}


add_rule(LayerRule(nn.Dense, input_axes=(0,), product="dot_general"))
add_rule(LayerRule(nn.DenseGeneral, _dense_general, product="dot_general"))
add_rule(LayerRule(nn.Einsum, plain=True))
for _name in ["Embed", "Conv", "ConvLocal", "ConvTranspose", "PReLU"]:
    add_no_linear_layer(getattr(nn, _name))
for _name in ["Batch", "Layer", "RMS", "Group", "Instance", "Weight", "Spectral"]:
    add_no_linear_layer(getattr(nn, _name + "Norm"))


def discover(
    base: nn.Module,
    config: RandLoraConfig,
    parameters: Parameters,
    variables: trees.Tree,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    method: Any = None,
    rngs: Mapping[str, Any] | None = None,
) -> tuple[list[Site], Seen]:
    """The sites of a base, which is traced on the arguments and not run; and what was seen.

    Raises:
      ValueError: for targets that match nothing or nothing linear, and for parameters that are not
        those of the base.
    """
    call = unbound(base, method)
    _, kwargs = deterministic_of(call, args, kwargs)
    leaves, treedef = jax.tree.flatten((args, kwargs))
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    # Undivided, as the parameters are that the trace makes: types of both must agree in `nn.vmap`.
    arrays = [
        jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype)
        for a, leaf in zip(is_array, leaves, strict=True)
        if a
    ]

    def trace(arrays, seen):
        arrays = iter(arrays)
        all_leaves = [next(arrays) if a else leaf for a, leaf in zip(is_array, leaves, strict=True)]
        args, kwargs = jax.tree.unflatten(treedef, all_leaves)
        # As init does, of which every model is capable: a cache is made and not used up. The
        # key stands in for any other that is missing, and nothing is drawn from it.
        keys = {"params": jax.random.key(0), **(rngs or {})}
        with nn.intercept_methods(seen):
            run = seen.calls.marked(call)
            # Flax's own: a model may have another method of that name.
            return nn.Module.init(base, keys, *args, method=run, mutable=True, **kwargs)["params"]

    seen = Discovery(config, parameters)
    shapes = jax.eval_shape(functools.partial(trace, seen=seen), arrays)
    if seen.undecided - {path for path, _ in seen.found}:
        # Kernels that only other methods than the call use: nothing better will tell of them.
        seen = Discovery(config, parameters, decided=seen.undecided)
        shapes = jax.eval_shape(functools.partial(trace, seen=seen), arrays)
    traced = dict(trees.items(trees.unboxed(shapes)))
    given = dict(trees.items(variables["params"]))
    kernels = {(*module, name) for module, name in seen.found}
    names = [trees.dotted(path) for path in given]
    check_parameters(parameters, names, map(trees.dotted, kernels))
    shapes = {path: trees.unboxed(leaf).shape for path, leaf in given.items()}
    free = map(trees.dotted, may_be_kernels(shapes, kernels))
    raw = {trees.dotted(path) for path in kernels}
    targets.check(config, seen.modules, trees.modules_of(given), seen.submodules, free, raw)
    sites = [_site(module, kernel, config, traced) for (module, _), kernel in seen.found.items()]
    check_orientation(sites, config)
    classes = {name: cls for name, (cls, _) in seen.modules.items()}
    chosen = select_layers([_as_given(site, given) for site in sites], config)
    return chosen, Seen(classes, shapes, seen.shapes)


def _site(module: trees.Path, kernel: Kernel, config: RandLoraConfig, traced) -> Site:
    """A kernel as its layer saw it, with the axes that it and its scales have got around it."""
    site = Site(module, kernel)
    stored = traced[site.kernel_path].shape
    scales = zip(
        (traced[(*site.path, scale)].shape for scale in SCALES),
        kernel.scale_shapes(config.r),
        strict=True,
    )
    try:
        axes = stack_axes(stored, kernel.shape, *scales)
    except ValueError as error:
        raise ValueError(f"{trees.shown(module)}: {error}") from None
    return Site(module, kernel, Stack(axes, Stack(axes).split(stored)[1]))


def adaptable(
    module: nn.Module,
    name: str,
    config: RandLoraConfig,
    parameters: Parameters,
    call: Arguments | None,
) -> dict[Kernel, str]:
    """The kernels that a module holds itself, and by which name each is a target.

    Args:
      call: (args, kwargs); None in another method, which may not tell how its layer's call uses
        the kernel: then that is left out.
    """
    own = module.variables.get("params", {})
    found: dict[Kernel, str] = {}
    rules = [rule] if (rule := rule_for(type(module))) is not None else []
    for rule, label in [(r, n) for r in rules for n in r.kernels_of(module) if n in own]:
        value = trees.unboxed(own[label])
        try:
            kernel = rule.describe(module, label, value, config.fan_in_fan_out, call)
        except ValueError as error:
            if targets.selection(config, name) is not Selection.NO:
                raise ValueError(f"{trees.shown(module.path)}: {error}") from None
        else:
            found |= {} if kernel is None else {kernel: name}
    values = {k: trees.unboxed(leaf) for k, leaf in own.items() if not isinstance(leaf, Mapping)}
    for path, (kernel, stack) in raw_kernels(name, values, parameters).items():
        if not stack.axes:  # else it is seen from outside of a lifted layer, and inside again
            found.setdefault(kernel, path)
    return found


@dataclasses.dataclass(eq=False)
class Discovery:
    """Interceptor that adds zero scales beside each target's kernel, and notes what it saw.

    Attributes:
      decided: paths of modules whose other methods decide what their call does not.
      calls: what runs as the model's own.
      modules: by name, each module's class and whether it can be adapted.
      submodules: names of what `setup` made, which need not run: a nested apply runs copies.
      found: the targets' kernels by (module, name).
      shapes: of parameters by path, as the innermost module that holds them sees them.
      undecided: paths of modules of which a method ran that does not tell of their kernel.
      running: modules of which a method runs: other methods of theirs within it decide nothing.
    """

    config: RandLoraConfig
    parameters: Parameters
    decided: set[trees.Path] = dataclasses.field(default_factory=set)
    calls: OurCall = dataclasses.field(default_factory=OurCall)
    modules: dict[str, tuple[type, bool]] = dataclasses.field(default_factory=dict)
    submodules: set[str] = dataclasses.field(default_factory=set)
    found: dict[tuple[trees.Path, str], Kernel] = dataclasses.field(default_factory=dict)
    shapes: dict[trees.Path, Shape] = dataclasses.field(default_factory=dict)
    undecided: set[trees.Path] = dataclasses.field(default_factory=set)
    running: list[nn.Module] = dataclasses.field(default_factory=list)

    def __call__(
        self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext
    ) -> Any:
        """One call of any module's method, as Flax hands it over."""
        module, method = context.module, method_of(context)
        if method is None or not self.calls.has(module):
            return next_fun(*args, **kwargs)
        within = any(outer.path == module.path for outer in self.running)
        self.running.append(module)
        try:
            y = next_fun(*args, **kwargs)
        finally:
            self.running.pop()
        if not within or method == "__call__":
            self._note(module, (args, kwargs) if method == "__call__" else None)
        return y

    def _note(self, module: nn.Module, call: Arguments | None) -> None:
        """Notes a module whose method has run, and adds scales for its targets."""
        name, rule = trees.dotted(module.path), rule_for(type(module))
        if call is None and module.path in self.decided:
            call = (), {}
        kernels = adaptable(module, name, self.config, self.parameters, call)
        is_target = targets.selection(self.config, name) is not Selection.NO
        if rule is not None and call is not None and is_target and module.path not in self.decided:
            own = module.variables.get("params", {})
            check_has_kernel(rule.kernels_of(module), name, own, self.config)
        if rule is not None and call is None and is_target and name not in kernels.values():
            self.undecided.add(module.path)
        self.modules.setdefault(name, (type(module), rule is not None))
        for path, leaf in trees.items(module.variables.get("params", {})):
            shape, known = trees.unboxed(leaf).shape, self.shapes.get((*module.path, *path))
            if known is None or len(shape) < len(known):
                self.shapes[(*module.path, *path)] = shape
        for value in vars(module).values():
            for child in value if isinstance(value, tuple) else (value,):
                if isinstance(child, nn.Module) and child.scope is not None:
                    self.submodules.add(trees.dotted(child.path))
        for kernel, target in kernels.items():
            self.modules[target] = (type(module), True)
            is_raw = target != name  # asked for by its path already
            if is_raw or is_target:
                self._add_scales(module, kernel)

    def _add_scales(self, module: nn.Module, kernel: Kernel) -> None:
        own, scope = module.variables["params"], module.scope
        assert scope is not None  # it is running
        if (kernel.label[0] if kernel.label else LAMBDA) in own:
            return  # a lifted layer was seen inside already, a shared one at its first call
        for outer in self.running:
            if isinstance(outer, (nn.WeightNorm, nn.SpectralNorm)):  # they map parameters
                raise ValueError(
                    f"{trees.shown(module.path)} is within a {type(outer).__name__}, which "
                    "would change its scales too: give its name to exclude_modules"
                )
        self.found[module.path, kernel.name] = kernel
        # Their place says how they are stacked: with the kernel, by whatever lifts its layer.
        zeros = {
            scale: jnp.zeros(shape)
            for scale, shape in zip(SCALES, kernel.scale_shapes(self.config.r), strict=True)
        }
        for key, value in ({kernel.label[0]: zeros} if kernel.label else zeros).items():
            # Not scope.param, which would draw a key and so change the base's initial values.
            scope.variable("params", key, lambda value=value: value)


def _as_given(site: Site, given: Mapping[trees.Path, Any]) -> Site:
    """A site of the model that was traced, as the given parameters have it.

    Raises:
      ValueError: where they are not those of the model, or can't be adapted.
    """
    name, shape = trees.dotted(site.kernel_path), site.stored_shape
    if site.kernel_path not in given:
        raise ValueError(f"'params' has no {name!r}: it is of another model")
    value = trees.unboxed(given[site.kernel_path])
    if value.shape != shape:
        raise ValueError(
            f"'params' has a {name!r} of {value.shape}, but the model has {shape}: it is of "
            "another model"
        )
    try:
        kernel = dataclasses.replace(site.kernel, dtype=value.dtype)
    except ValueError as error:
        raise ValueError(f"{trees.shown(site.path)}: {error}") from None
    return dataclasses.replace(site, kernel=kernel)
