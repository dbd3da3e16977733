"""What an adapter starts from: scales that give a zero update, and the bases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from randlora_jax import bases, trees
from randlora_jax.config import RandLoraConfig
from randlora_jax.sites import GAMMA, Site

Scales = dict[trees.Path, jax.Array]


def initial_values(
    configs: Mapping[str, RandLoraConfig], sites: Mapping[str, Sequence[Site]], dtype: DTypeLike
) -> tuple[dict[str, Scales], bases.Bases]:
    """The scales of each adapter, by path, and the bases of a dtype that serve all their sites."""
    scales = {name: initial_scales(config, sites[name]) for name, config in configs.items()}
    first = next(iter(configs.values()))  # they agree on all that the bases depend on
    shapes = [site.kernel.features for own in sites.values() for site in own]
    return scales, bases.draw(first, *bases.read_dims(first, shapes), dtype)


def initial_scales(config: RandLoraConfig, sites: Iterable[Site]) -> Scales:
    """PEFT's start: lambda 0 and gamma 1 / max of its shape; or lambda normal, gamma 1 / max."""
    values = {}
    for site in sites:
        for path, stored in site.stored_scales(config.r).items():
            shape, dtype = stored.shape, stored.dtype
            if path[-1] == GAMMA:
                of_gamma, features = site.kernel.scale_shapes(config.r)[1], site.kernel.features
                size = max(of_gamma[-2:] if config.init_weights else features)
                values[path] = jnp.full(shape, 1 / size, dtype)
            elif config.init_weights:
                values[path] = jnp.zeros(shape, dtype)
            else:
                key = trees.key_of(config.projection_prng_key, path)
                values[path] = jax.random.normal(key, shape, dtype)
    return values
