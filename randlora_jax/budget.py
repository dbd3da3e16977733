"""Which r to take: more rank is fewer parameters, the other way round than for LoRA."""

from __future__ import annotations

from collections.abc import Iterable

from randlora_jax import trees
from randlora_jax.bases import num_bases
from randlora_jax.checks import check_config, check_variables
from randlora_jax.config import RandLoraConfig
from randlora_jax.stored import sites_of


def num_parameters(shapes: Iterable[tuple[int, int]], r: int) -> int:
    """Parameters that RandLoRA trains on kernels of these (in, out) shapes.

    Example:
      >>> num_parameters([(4096, 4096)], r=32)
      528384
    """
    smaller = [min(shape) for shape in shapes]
    return sum(num_bases(small, r) * (r + small) for small in smaller)


def matching_config(
    variables: trees.Tree,
    config: RandLoraConfig,
    *,
    lora_rank: int | None = None,
    max_parameters: int | None = None,
) -> RandLoraConfig:
    """The config with the r whose parameter count comes nearest to a budget from below.

    `randlora_alpha` goes with r, so that the scaling of the updates stays what it is in `config`.

    Args:
      variables: of the model, adapted with any r (under `jax.eval_shape` it costs nothing).
      config: the one it was adapted with.
      lora_rank: the budget is what LoRA at this rank trains on the same kernels.
      max_parameters: the budget as a number.

    Raises:
      ValueError: if not exactly one budget is given, or if no r is within it.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from randlora_jax.linen import RandLora
      >>> config = RandLoraConfig(target_modules="all-linear")
      >>> model = RandLora(nn.Dense(64), config)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 64)))
      >>> found = matching_config(variables, config, lora_rank=8)  # LoRA: 1,024, this: 897
      >>> found.r, found.randlora_alpha, found.scaling == config.scaling
      (5, 100.0, True)
    """
    check_variables(variables, "params", "randlora", "randlora_bases")
    check_config(config)
    if (lora_rank is None) == (max_parameters is None):
        raise ValueError(
            f"give one budget: lora_rank={lora_rank!r} and max_parameters={max_parameters!r}"
        )
    sites = sites_of(variables, config, guess=True)
    shapes = [features for site in sites for features in [site.kernel.features] * site.count]
    if max_parameters is None:
        max_parameters = sum((lora_rank or 0) * (ins + outs) for ins, outs in shapes)
    counts = {r: num_parameters(shapes, r) for r in range(1, max(map(min, shapes)) + 1)}
    # Past the smaller side there is one basis, and more rank is more parameters again.
    within = [r for r, count in counts.items() if count <= max_parameters]
    if not within:
        least = min(counts.values())
        raise ValueError(
            f"no r trains as few as {max_parameters:,} parameters: the least is {least:,}"
        )
    r = max(within, key=lambda r: (counts[r], -r))
    return config.replace(r=r, randlora_alpha=config.randlora_alpha * r / config.r)
