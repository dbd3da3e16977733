"""What a `RandLora` makes of its config: variables with an adapter, and the interceptor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
from flax.core import unfreeze

from randlora_jax import trees
from randlora_jax.adapters import named
from randlora_jax.checks import check_variables
from randlora_jax.initial import initial_values
from randlora_jax.left_out import warn_of_left_out
from randlora_jax.linen.calls import deterministic_of
from randlora_jax.linen.discovery import discover
from randlora_jax.linen.layers import Interceptor
from randlora_jax.linen.scales import boxed
from randlora_jax.ops.rows import checked_ids
from randlora_jax.quantised import wrapped_by_qwix
from randlora_jax.sharding import whole_beside

if TYPE_CHECKING:
    from randlora_jax.linen.model import RandLora

ADDED = ("randlora", "randlora_bases")


def check_base(base: nn.Module) -> None:
    """Raises a ValueError for a model that qwix has wrapped: it runs our layers past its own."""
    if wrapped_by_qwix(type(base)):
        raise ValueError(
            f"the {type(base).__name__} is what qwix.quantize_model makes, which quantises inside "
            "its calls, activations too where act_qtype says so: give the model itself, as in "
            "RandLora(model, config).adapt({'params': quantized_params}, x)"
        )


def base_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The collections that are the base's."""
    return {name: tree for name, tree in variables.items() if name not in ADDED}


def adapted_variables(
    model: RandLora, variables: trees.Tree, args: Any, kwargs: Any, method: Any, rngs: Any
) -> dict[str, Any]:
    """As `RandLora.adapt`, of whose caller warnings speak."""
    check_base(model)
    check_variables(variables, "params")
    variables = unfreeze(dict(variables))
    if "randlora" in variables:
        raise ValueError(
            "variables has an adapter already, which adapt would set to its start: "
            "adapt({'params': variables['params']}, x) makes a new one, and "
            "rl.adapters.insert adds one to it"
        )
    configs = named.by_name(model.config)
    given = variables, args, kwargs, method, rngs
    found = {n: discover(model.base, c, model.parameters, *given) for n, c in configs.items()}
    sites = {name: of_one for name, (of_one, _) in found.items()}
    _, seen = next(iter(found.values()))
    warn_of_left_out(seen, sites, configs, stacklevel=4)
    scales, bases = initial_values(configs, sites, model.bases_dtype)
    scales, bases = whole_beside(variables["params"], (scales, bases))
    by_name = {name: boxed(scales[name], sites[name], variables) for name in configs}
    return {**variables, "randlora": named.together(by_name), "randlora_bases": bases}


def interceptor_of(
    model: RandLora, call: Any, variables: Any, args: Any, kwargs: Any, rngs: Any
) -> tuple[Interceptor, dict[str, Any]]:
    """What adapts the layers in a call; the base's keywords."""
    check_base(model)
    active = named.active(model.config, model.active)
    given, kwargs = deterministic_of(call, args, kwargs)
    given = model.deterministic if given is None else given
    if active:
        check_variables(variables, "params", *ADDED)
    rate = max((config.randlora_dropout for config in active.values()), default=0)
    if rate and given is None:
        raise ValueError(
            f"randlora_dropout={rate} needs deterministic=True or False, in the call or in "
            "RandLora(..., deterministic=...)"
        )
    bases = dict(variables.get("randlora_bases", {}))
    ids = checked_ids(kwargs.get("adapter_ids"), bases if active else None)
    kwargs = {name: value for name, value in kwargs.items() if name != "adapter_ids"}
    off = rate == 0 or bool(given)
    key = rngs.get("dropout", rngs.get("params")) if isinstance(rngs, Mapping) else rngs
    settings = model.parameters, bases, off, model.strategy, model.layout
    return Interceptor(active, *settings, key, ids), kwargs
