"""Quantising the linear kernels of a Linen model's variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
from jax.typing import DTypeLike

from randlora_jax import trees
from randlora_jax.checks import check_variables
from randlora_jax.config import RandLoraConfig
from randlora_jax.linen.adapting import check_base
from randlora_jax.linen.discovery import discover
from randlora_jax.quantising import How, quantise_sites
from randlora_jax.raw_parameters import Parameters


def quantize(
    base: nn.Module,
    variables: trees.Tree,
    *args: Any,
    qtype: DTypeLike = "int8",
    tile_size: int | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    parameters: Parameters | None = None,
    donate: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """Quantises the kernels of a model's linear layers with qwix, for `RandLora(base, config)`.

    They become `qwix.QArray`s, as `qwix.quantize_params` makes them of the same rule. Each stays
    where it is, divided as it is, and one is made after the other: there is no second copy of the
    base. The base's own `apply` can't read them; `RandLora(base, config, active=())` can.

    Args:
      base: the model, not wrapped by `qwix.quantize_model`.
      variables: the base's, `{"params": ...}`; abstract ones give abstract ones.
      *args, **kwargs: example inputs, as the base is called; it is traced and not run.
      qtype: "int8", "int4", "nf4", or what else qwix knows.
      tile_size: how many numbers along a kernel's (last) input axis share a scale; None is all.
      target_modules, exclude_modules: which layers, as in a `RandLoraConfig`.
      parameters: raw parameters to quantise, as for `RandLora`.
      donate: delete each kernel when its codes are there: then memory never holds both of more
        than one kernel, and the given variables can't be used any more.

    Returns:
      The variables as given, those kernels quantised; what is quantised already stays as it is.

    Raises:
      ValueError: for targets that match nothing, a type that qwix does not know, and tiles that
        don't divide a layer's inputs, before anything is done.
      ImportError: without qwix, the extra "quantised".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from randlora_jax.linen import RandLora
      >>> x, base = jnp.ones((1, 64)), nn.Dense(8)
      >>> variables = base.init(jax.random.key(0), x)
      >>> quantised = quantize(base, variables, x, qtype="nf4", tile_size=32)
      >>> quantised["params"]["kernel"].scale.shape
      (2, 8)
      >>> model = RandLora(base, RandLoraConfig(r=2, target_modules="all-linear"))
      >>> model.apply(model.adapt(quantised, x), x).shape
      (1, 8)
    """
    how = How(qtype, tile_size)
    check_variables(variables, "params")
    check_base(base)
    config = RandLoraConfig(target_modules=target_modules, exclude_modules=exclude_modules)
    sites, _ = discover(base, config, parameters or {}, variables, args, kwargs)
    params = dict(trees.items(variables["params"]))
    params |= dict(quantise_sites(params, sites, how, donate=donate))
    return {**variables, "params": trees.build(params)}
