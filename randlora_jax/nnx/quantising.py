"""Quantising the linear kernels of an NNX model, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from flax import nnx
from jax.typing import DTypeLike

from randlora_jax.config import RandLoraConfig
from randlora_jax.nnx.attaching import attach_products
from randlora_jax.nnx.discovery import check_model, find, modules_of, variable_of
from randlora_jax.quantising import How, quantise_sites
from randlora_jax.raw_parameters import Parameters

Model = TypeVar("Model", bound=nnx.Module)


def quantize(
    model: Model,
    *,
    qtype: DTypeLike = "int8",
    tile_size: int | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    parameters: Parameters | None = None,
) -> Model:
    """Quantises the kernels of a model's linear layers in place with qwix; then `inject` it.

    Their variables hold `qwix.QArray`s from now on, as `qwix.quantize` makes them of the same rule,
    and their layers a subclass of their own class, which multiplies by these. Each kernel stays
    where it is, divided as it is, and one is made after the other: there is no second copy of the
    base, unless somebody else holds the old one.

    Args:
      model: the model, injected or not, not wrapped by `qwix.quantize_model`.
      qtype: "int8", "int4", "nf4", or what else qwix knows.
      tile_size: how many numbers along a kernel's (last) input axis share a scale; None is all.
      target_modules, exclude_modules: which layers, as in a `RandLoraConfig`.
      parameters: raw parameters to quantise, as for `inject`.

    Returns:
      The model itself. What is quantised already stays as it is.

    Raises:
      ValueError: for targets that match nothing, a type that qwix does not know, and tiles that
        don't divide a layer's inputs, before anything is changed.
      ImportError: without qwix, the extra "quantised".

    Example:
      >>> import jax.numpy as jnp
      >>> from randlora_jax.nnx import inject
      >>> model = quantize(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), qtype="nf4", tile_size=32)
      >>> model.kernel.get_value().scale.shape
      (2, 8)
      >>> model = inject(model, RandLoraConfig(r=2, target_modules="all-linear"))
      >>> model(jnp.ones((1, 64))).shape
      (1, 8)
    """
    how, modules = How(qtype, tile_size), modules_of(model)
    check_model(model, modules)
    config = RandLoraConfig(target_modules=target_modules, exclude_modules=exclude_modules)
    sites = find(modules, config, parameters or {})
    variables = {site.kernel_path: variable_of(modules, site) for site in sites}
    values = {path: variable.get_value() for path, variable in variables.items()}
    for path, value in quantise_sites(values, sites, how):
        variables[path].set_value(value)
        values[path] = value
    attach_products(modules)
    return model
