"""What an adapter starts from: scales that give a zero update, and the bases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from randlora_jax import bases, trees
from randlora_jax.config import RandLoraConfig
from randlora_jax.sites import GAMMA, Site


def initial_scales(config: RandLoraConfig, sites: Iterable[Site]) -> dict[trees.Path, jax.Array]:
    """PEFT's start: lambda 0 and gamma 1 / max of its shape; or lambda normal, gamma 1 / max."""
    values = {}
    for site in sites:
        for path, stored in site.stored_scales(config.r).items():
            shape, dtype = stored.shape, stored.dtype
            if path[-1] == GAMMA:
                of_gamma, features = site.kernel.scale_shapes(config.r)[1], site.kernel.features
                size = max(of_gamma if config.init_weights else features)
                values[path] = jnp.full(shape, 1 / size, dtype)
            elif config.init_weights:
                values[path] = jnp.zeros(shape, dtype)
            else:
                key = trees.key_of(config.projection_prng_key, path)
                values[path] = jax.random.normal(key, shape, dtype)
    return values


def initial_bases(
    configs: Mapping[str, RandLoraConfig], sites: Mapping[str, Sequence[Site]], dtype: DTypeLike
) -> bases.Bases:
    """The bases that serve all sites of all adapters, whose configs agree on them."""
    first: Any = next(iter(configs.values()))
    dims = bases.shared_dims(site.kernel.features for own in sites.values() for site in own)
    return bases.draw(first, *dims, dtype)
