"""RandLoRA for Flax Linen: a wrapper that adapts the linear layers of any module it is given.

Inside the model the scales sit in `"params"` beside their kernel, the one place that survives
`nn.scan` and `nn.vmap` written with `variable_axes={"params": 0}`. Outside, the wrapper shows them
as the collection `"randlora"`, so that the base's parameters are what they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import unfreeze
from jax.typing import DTypeLike

from randlora_jax import adapters, merging, trees
from randlora_jax import bases as bases_lib
from randlora_jax.config import RandLoraConfig
from randlora_jax.dot_general import Strategy
from randlora_jax.linen.calls import (
    deterministic_of,
    discover,
    is_scale,
    passed_on,
    traced_anew,
    unbound,
)
from randlora_jax.linen.interception import Adapt

_ADDED = ("randlora", "randlora_bases")
_ALL = nn.DenyList("intermediates")  # what init returns, as in Flax


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
      bases_dtype: of the bases that `adapt` and `init` draw; bfloat16 halves them, in memory and
        in checkpoints. Ternary bases are int8 whatever it says.

    Raises:
      ValueError: for targets that match nothing or nothing linear, for missing collections and
        for shapes that don't fit, before anything is computed.

    Example:
      >>> import jax, jax.numpy as jnp
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
    bases_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        base = self.base
        if isinstance(base, RandLora):
            raise ValueError("base is a RandLora already: name its adapters in one config, {...}")
        # As an attribute of ours it would be adopted: under the name "base", with keys that
        # depend on it. It is bound as Flax binds an outermost module instead.
        object.__setattr__(self, "base", None)
        super().__post_init__()
        adapters.check_names(self.config, self.active)
        if self.scope is not None and base.scope is None:
            base = base.clone(parent=self.scope, name=base.name or "base")
        object.__setattr__(self, "base", base)
        if self.scope is not None and base.scope is not self.scope:
            nn.share_scope(self, base)  # no level of its own in the base's paths

    def apply(self, variables, *args, method=None, mutable=False, **options):
        """`nn.Module.apply` of the base; `method` is one of the base's: a name or a function."""
        call = unbound(self.base, method)
        names = ("rngs", "capture_intermediates")
        outer = {k: options.pop(k) for k in names if k in options}
        interceptor, kwargs = self._interceptor(call, variables, args, options)
        inside = {k: v for k, v in variables.items() if not k.startswith("randlora")}
        if interceptor is not None:
            inside["params"] = self._joined(variables)
        with nn.intercept_methods(interceptor or passed_on):
            result = self.base.apply(
                inside, *args, method=traced_anew(call), mutable=mutable, **outer, **kwargs
            )
        if mutable is False or "params" not in result[1]:
            return result
        params = trees.select(result[1]["params"], lambda path, _: not is_scale(path[-1]))
        return result[0], {**result[1], "params": params}

    def init_with_output(self, rngs, *args, method=None, mutable=_ALL, **options):
        """`nn.Module.init_with_output` of the base, and then `adapt`."""
        _, kwargs = deterministic_of(unbound(self.base, method), args, options)
        y, variables = self.base.init_with_output(
            rngs, *args, method=unbound(self.base, method), mutable=mutable, **kwargs
        )
        variables = self.adapt(variables, *args, method=method, **options)
        if not self._starts_at_zero:
            y = self.apply(variables, *args, method=method, **{"deterministic": True, **options})
        return y, variables

    def __call__(self, *args, **kwargs):
        """Runs the base within another module; `apply` and `init` do without."""
        call = unbound(self.base, None)
        if self.is_initializing():
            _, known = deterministic_of(call, args, kwargs)
            y = call(self.base, *args, **known)
            missing = [c for c in ("randlora", "randlora_bases") if c not in self.variables]
            if missing:
                variables = {k: v for k, v in self.base.variables.items() if k not in _ADDED}
                outside = self.clone(parent=None, base=self.base.clone(parent=None))
                added = outside.adapt(variables, *args, **kwargs)
                for collection in missing:
                    for name, value in added[collection].items():
                        self.scope.put_variable(collection, name, value)
            if self._starts_at_zero:
                return y
            kwargs = {"deterministic": True, **kwargs}
        interceptor, kwargs = self._interceptor(call, self.variables, args, kwargs)
        if interceptor is None:
            return call(self.base, *args, **kwargs)
        interceptor.depth = len(self.base.path)

        def adapted(base, *args, **kwargs):
            with nn.intercept_methods(interceptor):
                return traced_anew(call)(base, *args, **kwargs)

        join = lambda target: {"params": self._joined(target)}
        run = nn.map_variables(adapted, ["params", "randlora"], trans_in_fn=join, mutable=False)
        return run(self.base, *args, **kwargs)

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
            found, shapes = discover(
                self.base, config, self.parameters, variables, args, kwargs, method, rngs
            )
            scales[name] = adapters.initial_scales(config, found, shapes)
            sides += [kernel.sides for kernel in found.values()]
        first = next(iter(adapters.named(self.config).values()))
        return {
            **variables,
            "randlora": scales if isinstance(self.config, Mapping) else scales[""],
            "randlora_bases": bases_lib.draw(
                first, *bases_lib.shared_dims(sides), self.bases_dtype
            ),
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
                known, _ = discover(self.base, config, self.parameters, base, args, kwargs)
            params = merging.merge({**one, "params": params}, config, safe=safe, known=known)
        return params

    @property
    def _starts_at_zero(self) -> bool:
        return all(config.init_weights for config in adapters.named(self.config).values())

    @nn.nowrap
    def _active(self) -> list[tuple[str, RandLoraConfig, str]]:
        """(name, config, suffix of the scales' names inside the model) of each active adapter."""
        configs = adapters.named(self.config)
        names = adapters.active_names(self.config, self.active)
        return [(name, configs[name], f":{name}" if name else "") for name in names]

    @nn.nowrap
    def _joined(self, variables) -> dict[str, Any]:
        """Parameters with the active adapters' scales beside their kernels."""
        params = variables.get("params", {})
        for name, config, suffix in self._active():
            scales = variables.get("randlora", {})
            params = adapters.beside_kernels(
                params, scales[name] if name else scales, config, suffix
            )
        return params

    @nn.nowrap
    def _interceptor(self, call, variables, args, kwargs) -> tuple[Adapt | None, dict[str, Any]]:
        """What adapts the layers in a call, None if nothing is active; the base's keywords."""
        active = self._active()
        given, kwargs = deterministic_of(call, args, kwargs)
        given = self.deterministic if given is None else given
        if not active:
            return None, kwargs
        if not variables.get("randlora_bases") or "randlora" not in variables:
            raise ValueError(
                f"variables has the collections {sorted(variables)}, but an adapted model needs "
                "'randlora' and 'randlora_bases' too: make them with adapt(variables, x)"
            )
        rate = max(config.randlora_dropout for _, config, _ in active)
        if rate and given is None:
            raise ValueError(
                f"randlora_dropout={rate} needs deterministic=True or False, in the call or in "
                "RandLora(..., deterministic=...)"
            )
        bases = dict(variables["randlora_bases"])
        suffixed = [(config, suffix) for _, config, suffix in active]
        off = rate == 0 or bool(given)
        return Adapt(suffixed, self.parameters, bases, off, self.strategy), kwargs
