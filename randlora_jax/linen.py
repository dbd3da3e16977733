"""RandLoRA for Flax Linen: a wrapper that adapts the linear layers of any module it is given.

Inside the model the scales sit in `"params"` beside their kernel, the one place that survives
`nn.scan` and `nn.vmap` written with `variable_axes={"params": 0}`. Outside, the wrapper shows them
as the collection `"randlora"`, so that the base's parameters are what they were.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze

from randlora_jax import adapters, merging, targets, trees
from randlora_jax import bases as bases_lib
from randlora_jax.config import RandLoraConfig
from randlora_jax.dot_general import Strategy
from randlora_jax.interception import Adapt, Discover
from randlora_jax.kernels import SCALES, Kernel


class RandLora(nn.Module):
    """A module whose linear layers compute with `W + dW`; everything else is the base's.

    It is called like its base, has its base's parameter paths and initial values, and keeps what
    it adds in two collections: `"randlora"`, a `randlora_lambda` (r, n) and a `randlora_gamma`
    (n, min(in, out)) for each adapted kernel, stacked where the kernel is, float32; and
    `"randlora_bases"`, `randlora_A` and `randlora_B`, once for all layers.

    Attributes:
      base: the module to adapt; it stays as it is.
      config: what to adapt and how; or several adapters by name, {"chat": config, ...}, on the
        same bases. Then `"randlora"` holds a tree for each name.
      active: the names whose updates are summed; all by default, () for the base alone.
      parameters: raw parameters to adapt, which belong to no layer: by path, or suffix of one at
        a dot, with the axes that are inputs, as in {"mlp.gating_einsum": (1,)}.
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
    config: RandLoraConfig | Mapping[str, RandLoraConfig]
    active: tuple[str, ...] | None = None
    parameters: Mapping[str, tuple[int, ...]] = nn.FrozenDict()
    deterministic: bool | None = None
    strategy: Strategy = "auto"

    def __post_init__(self):
        super().__post_init__()
        adapters.check_names(self.config, self.active)
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
        scales, sides = {}, []
        for name, config in adapters.named(self.config).items():
            found, shapes = self._discover(config, variables, args, kwargs, method, rngs)
            scales[name] = _initial_scales(config, found, shapes)
            sides += [kernel.sides for kernel in found.values()]
        first = next(iter(adapters.named(self.config).values()))
        return {
            **variables,
            "randlora": scales if isinstance(self.config, Mapping) else scales[""],
            "randlora_bases": bases_lib.draw(first, *bases_lib.shared_dims(sides)),
        }

    def merge(self, variables, *args, safe: bool = True, **kwargs) -> dict[str, Any]:
        """The base's parameters with the active updates in them, for `base.apply({"params": ...})`.

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
        params = variables["params"]
        for name in adapters.active_names(self.config, self.active):
            one, config = adapters.select(variables, self.config, name)
            known = None
            if args or kwargs:
                base = {k: v for k, v in variables.items() if not k.startswith("randlora")}
                known, _ = self._discover(config, base, args, kwargs)
            params = merging.merge({**one, "params": params}, config, safe=safe, known=known)
        return params

    @nn.nowrap
    def _run(self, method, *args, **kwargs):
        call = _unbound(self.base, method)
        deterministic, kwargs = _deterministic(call, args, kwargs)
        deterministic = self.deterministic if deterministic is None else deterministic
        if self.is_initializing():
            y = call(self.base, *args, **kwargs)
            if not self.scope.has_variable("randlora_bases", "randlora_A"):
                variables = {k: v for k, v in self.base.variables.items() if k != "randlora"}
                unbound = self.clone(parent=None, base=self.base.clone(parent=None))
                added = unbound.adapt(variables, *args, method=method, **kwargs)
                for collection in ("randlora", "randlora_bases"):
                    for name, value in added[collection].items():
                        self.scope.put_variable(collection, name, value)
            if all(config.init_weights for config in adapters.named(self.config).values()):
                return y  # the update is zero
        active = adapters.active_names(self.config, self.active)
        bases = self.variables.get("randlora_bases")
        if active and (not bases or "randlora" not in self.variables):
            raise ValueError(
                f"variables has the collections {sorted(self.variables)}, but an adapted model "
                "needs 'randlora' and 'randlora_bases' too: make them with adapt(variables, x)"
            )
        if not active:
            return call(self.base, *args, **kwargs)
        configs = adapters.named(self.config)
        rate = max(configs[name].randlora_dropout for name in active)
        if rate and deterministic is None and not self.is_initializing():
            raise ValueError(
                f"randlora_dropout={rate} needs deterministic=True or False, in the call or in "
                "RandLora(..., deterministic=...)"
            )
        off = rate == 0 or deterministic is not False
        suffixed = [(configs[name], f":{name}" if name else "") for name in active]
        depth = len(self.base.path)

        def adapted(base, *args, **kwargs):
            interceptor = Adapt(suffixed, self.parameters, depth, dict(bases), off, self.strategy)
            with nn.intercept_methods(interceptor):
                return call(base, *args, **kwargs)

        def join(target):
            scales = target.get("randlora", {})
            for name, (config, suffix) in zip(active, suffixed, strict=True):
                one = scales[name] if name else scales
                target["params"] = adapters.beside_kernels(target["params"], one, config, suffix)
            return {"params": target["params"]}

        run = nn.map_variables(adapted, ["params", "randlora"], trans_in_fn=join, mutable=False)
        return run(self.base, *args, **kwargs)

    @nn.nowrap
    def _discover(self, config, variables, args, kwargs, method=None, rngs=None):
        """Traces the base: {path of scales: Kernel}, and the scales' shapes as they are stored."""
        discover = Discover(config, self.parameters)
        call = _unbound(self.base, method)
        _, kwargs = _deterministic(call, args, kwargs)
        leaves, treedef = jax.tree.flatten((args, kwargs))
        is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

        def trace(variables, arrays):
            arrays = iter(arrays)
            whole = [next(arrays) if a else leaf for a, leaf in zip(is_array, leaves, strict=True)]
            args, kwargs = jax.tree.unflatten(treedef, whole)
            with nn.intercept_methods(discover):
                _, updated = self.base.apply(
                    variables, *args, method=call, rngs=rngs, mutable=True, **kwargs
                )
            return updated["params"]

        arrays = [leaf for a, leaf in zip(is_array, leaves, strict=True) if a]
        params = jax.eval_shape(trace, variables, arrays)
        targets.check(config, discover.modules)
        if config.fan_in_fan_out and all(k.input_axes != (1,) for k in discover.found.values()):
            warnings.warn(
                "fan_in_fan_out=True has no effect here: no target stores its kernel (out, in)",
                stacklevel=3,
            )
        shapes = trees.select(params, lambda path, _: path[-1] in SCALES)
        return adapters.cut_stacks(discover.found, shapes, config)


def _entry(method):
    return lambda module, *args, **kwargs: module._run(method, *args, **kwargs)


def _unbound(base: nn.Module, method) -> Callable:
    """The base's method as a function of the module: by name, bound, or a function already."""
    name = "__call__" if method is None else method
    if not isinstance(name, str):
        return getattr(method, "__func__", method)
    if not callable(getattr(type(base), name, None)):
        raise ValueError(f"method={method!r} is none of {type(base).__name__}'s methods")
    return getattr(type(base), name)


def _deterministic(call, args, kwargs):
    """The call's own word on `deterministic`, and the keywords that the base takes."""
    parameters = inspect.signature(call).parameters
    given = kwargs.get("deterministic")
    if "deterministic" in parameters:
        position = list(parameters).index("deterministic") - 1  # less the module itself
        given = args[position] if 0 <= position < len(args) else given
    elif not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        kwargs = {k: v for k, v in kwargs.items() if k != "deterministic"}
    return given, kwargs


def _initial_scales(config: RandLoraConfig, found: dict[trees.Path, Kernel], shapes):
    """PEFT's start: lambda 0 and gamma 1 / max of its shape; or lambda normal, gamma 1 / max."""

    def start(path, leaf):
        kernel = found[path[:-1]]
        struct = nn.unbox(leaf)
        if path[-1] == SCALES[1]:
            sides = kernel.scale_shapes(config.r)[1] if config.init_weights else kernel.sides
            value = jnp.full(struct.shape, 1 / max(sides), struct.dtype)
        elif config.init_weights:
            value = jnp.zeros(struct.shape, struct.dtype)
        else:
            key = trees.key_of(config.projection_prng_key, path)
            value = jax.random.normal(key, struct.shape, struct.dtype)
        return nn.meta.replace_boxed(leaf, value)

    return trees.map_with_path(start, shapes)
