"""RandLoRA for Flax Linen: a wrapper that adapts the linear layers of any module it is given.

Inside the model the scales sit in `"params"` beside their kernel, the one place that survives
`nn.scan` and `nn.vmap` written with `variable_axes={"params": 0}`. Outside, the wrapper shows them
as the collection `"randlora"`, so that the base's parameters are what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core.scope import CollectionFilter
from flax.typing import PRNGKey, RNGSequences
from jax.typing import DTypeLike

from randlora_jax import merging, trees
from randlora_jax.adapters import named
from randlora_jax.checks import check_config
from randlora_jax.config import RandLoraConfig
from randlora_jax.layout import Layout, layout_of
from randlora_jax.linen.adapting import (
    ADDED,
    adapted_variables,
    base_of,
    check_base,
    interceptor_of,
)
from randlora_jax.linen.calls import deterministic_of, unbound
from randlora_jax.linen.discovery import discover
from randlora_jax.ops.costs import Strategy
from randlora_jax.raw_parameters import Parameters
from randlora_jax.sites import Site, is_scale

Method = Callable[..., Any] | str | None

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
        a dot, with the axes that are inputs, as in {"mlp.gating_einsum": (1,)}; or with an
        equation "x, kernel -> y", {"moe.gate": "ecd,edf->ecf"}, of which an axis that all three
        share is a stack: each expert has scales of its own, however the model uses them.
      deterministic: switches the adapter's dropout off, where the call does not say so. As for
        `nn.Dropout`, one of the two must, if `randlora_dropout` is not 0.
      strategy: "auto" picks the way with fewer operations, and then bytes, for the number of tokens
        at hand, forward and backward apart; "merged", "factored" and "vectors" force one, and
        "unmerged" the better of the last two.
      bases_dtype: of the bases that `adapt` and `init` draw; bfloat16 halves them, in memory and
        in checkpoints. Ternary bases are int8 whatever it says.
      layout: what `with_layout` notes.

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
    parameters: Parameters = nn.FrozenDict()
    deterministic: bool | None = None
    strategy: Strategy = "auto"
    bases_dtype: DTypeLike = jnp.float32
    layout: Layout | None = None

    def __post_init__(self) -> None:
        base = self.base
        if not isinstance(base, nn.Module):
            raise TypeError(
                f"base must be a Linen module, got a {type(base).__name__}: it comes first, then "
                "the config; randlora_jax.nnx.inject adapts an NNX model"
            )
        check_base(base)
        if isinstance(base, RandLora):
            raise ValueError("base is a RandLora already: name its adapters in one config, {...}")
        # As an attribute of ours it would be adopted: under the name "base", with keys that
        # depend on it. It is bound as Flax binds an outermost module instead.
        object.__setattr__(self, "base", None)
        super().__post_init__()
        check_config(self.config, several=True)
        named.check(self.config, self.active)
        if self.scope is not None and base.scope is None:
            base = base.clone(parent=self.scope, name=base.name or "base")
        object.__setattr__(self, "base", base)
        if self.scope is not None and base.scope is not self.scope:
            nn.share_scope(self, base)  # no level of its own in the base's paths

    @nn.nowrap
    def apply(
        self,
        variables: trees.Tree,
        *args: Any,
        method: Method = None,
        mutable: CollectionFilter = False,
        **options: Any,
    ) -> Any:
        """`nn.Module.apply` of the base; `method` is one of the base's: a name or a function.

        Where the variables hold a table of adapters (`rl.adapters.table`), `adapter_ids=` says
        which of them each row of the batch has: integers of shape (), (batch,), or of as many first
        axes of the inputs as you like, -1 for none. Every adapted layer takes them for the first
        axes of its own input, so that must begin as the batch does; else an error names it. Numbers
        that are no entry's are errors, or the base's rows where they are traced.
        """
        call = unbound(self.base, method)
        names = ("rngs", "capture_intermediates")
        outer = {k: options.pop(k) for k in names if k in options}
        interceptor, kwargs = interceptor_of(
            self, call, variables, args, options, outer.get("rngs")
        )
        inside = base_of(variables) | {"params": interceptor.params(variables)}
        with nn.intercept_methods(interceptor):
            run = interceptor.calls.marked(call)
            result = self.base.apply(inside, *args, method=run, mutable=mutable, **outer, **kwargs)
        if mutable is False or "params" not in result[1]:
            return result
        params = trees.filtered(result[1]["params"], lambda path, _: not is_scale(path[-1]))
        return result[0], {**result[1], "params": params}

    @nn.nowrap
    def init_with_output(
        self,
        rngs: PRNGKey | RNGSequences,
        *args: Any,
        method: Method = None,
        mutable: CollectionFilter = _ALL,
        **options: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """`nn.Module.init_with_output` of the base, and then `adapt`."""
        call = unbound(self.base, method)
        _, kwargs = deterministic_of(call, args, options)
        y, variables = self.base.init_with_output(
            rngs, *args, method=call, mutable=mutable, **kwargs
        )
        variables = self.adapt(variables, *args, method=method, **options)
        if not self._starts_at_zero:
            y = self.apply(variables, *args, method=method, **{"deterministic": True, **options})
        return y, variables

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the base within another module; `apply` and `init` do without."""
        call, scope = unbound(self.base, None), self.scope
        if scope is not None and self.is_initializing():
            _, known = deterministic_of(call, args, kwargs)
            y = call(self.base, *args, **known)
            missing = [collection for collection in ADDED if collection not in self.variables]
            if missing:
                outside = self.clone(parent=None, base=self.base.clone(parent=None))
                added = outside.adapt(base_of(self.base.variables), *args, **kwargs)
                for collection in missing:
                    for name, value in added[collection].items():
                        scope.put_variable(collection, name, value)
            if self._starts_at_zero:
                return y
            kwargs = {"deterministic": True, **kwargs}
        rngs = scope.rngs if scope is not None else None
        interceptor, kwargs = interceptor_of(self, call, self.variables, args, kwargs, rngs)
        interceptor.depth = len(self.base.path)

        def adapted(base, *args, **kwargs):
            with nn.intercept_methods(interceptor):
                return interceptor.calls.marked(call)(base, *args, **kwargs)

        join = lambda target: {"params": interceptor.params(target)}
        run = nn.map_variables(adapted, ["params", "randlora"], trans_in_fn=join, mutable=False)
        return run(self.base, *args, **kwargs)

    @nn.nowrap
    def adapt(
        self,
        variables: trees.Tree,
        *args: Any,
        method: Method = None,
        rngs: RNGSequences | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Adds scales and bases to a base's variables, of which no copy is made.

        The base is traced on the arguments, which can be `jax.ShapeDtypeStruct`s, and not run. What
        is added is on the mesh that the base is on, whole on each device: `rl.sharding` divides it.

        Args:
          variables: the base's, `{"params": ...}`.
          *args, **kwargs: example inputs, as the base is called.
          method: the base's method to trace, `__call__` by default.
          rngs: only where the traced call needs them.

        Returns:
          The variables as given, with `"randlora"` and `"randlora_bases"` beside them.

        Raises:
          ValueError: for targets that match nothing or nothing linear, for parameters that are
            not the base's, and for variables that have an adapter already.
        """
        return adapted_variables(self, variables, args, kwargs, method, rngs)

    @nn.nowrap
    def merge(
        self,
        variables: trees.Tree,
        *args: Any,
        safe: bool = True,
        requantize: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The base's parameters with the active updates in them, for `base.apply({"params": ...})`.

        Computed in float32 and rounded once to each kernel's dtype; the given variables stay as
        they are, so that nothing needs to be unmerged.

        Args:
          variables: as `adapt` returned them, trained or not.
          *args, **kwargs: example inputs as for `adapt`, needed only where a kernel's shape does
            not tell which of its axes are inputs (an error says so).
          safe: refuse results that are not finite. It needs real values: no effect under `jit`.
          requantize: as for `randlora_jax.merge`; by default a quantised base becomes floats.

        Raises:
          ValueError: naming the layer, if its merged kernel is not finite or nothing fits.
        """
        active = named.active(self.config, self.active)
        known: dict[trees.Path, Site] = {}
        for config in active.values() if args or kwargs else ():
            base = base_of(variables)
            seen, _ = discover(self.base, config, self.parameters, base, args, kwargs)
            known |= {site.path: site for site in seen}
        options = {"safe": safe, "requantize": requantize}
        return merging.merge_adapters(variables, self.config, active, known, **options)

    @nn.nowrap
    def with_layout(self, variables: trees.Tree, batch: Any) -> RandLora:
        """The same model, told how its arrays are divided on a mesh with automatic axes.

        It computes the same, but needs no callback of the compiler: so it can be exported
        (`jax.export`), serialised, lowered for a mesh that is not there, and found in JAX's
        persistent compilation cache. Arrays that are divided otherwise are moved, and right.
        `jax.vmap` with a `spmd_axis_name` that divides the batch or kernels is refused by JAX then.

        Args:
          variables: as `adapt` returned them, on the mesh; `jax.ShapeDtypeStruct`s with shardings
            will do.
          batch: one that the model is called on, its first axes those of the tokens: an array, a
            `jax.ShapeDtypeStruct`, or a `NamedSharding`.

        Raises:
          ValueError: if the batch is on no mesh, or a kernel on another.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> from jax.sharding import NamedSharding, PartitionSpec
          >>> mesh = jax.make_mesh((1,), ("data",))
          >>> model = RandLora(nn.Dense(3), RandLoraConfig(r=2, target_modules="all-linear"))
          >>> variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
          >>> told = model.with_layout(variables, NamedSharding(mesh, PartitionSpec("data")))
          >>> told.layout.told(()).tokens
          (('data',),)
        """
        return self.clone(layout=layout_of(variables, self.config, batch))

    @property
    def _starts_at_zero(self) -> bool:
        return all(config.init_weights for config in named.by_name(self.config).values())
