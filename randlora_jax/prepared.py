"""An adapter's update of one kernel, checked and scaled, as a front end hands it to `updates`."""

from __future__ import annotations

import dataclasses

import jax

from randlora_jax.bases import SCALING, Bases, check_rank
from randlora_jax.config import RandLoraConfig
from randlora_jax.ops.dot_general import Dropout, Scales, check_fit, prepare_scales
from randlora_jax.ops.rows import scales_of_rows
from randlora_jax.sites import Kernel


@dataclasses.dataclass(frozen=True)
class Update:
    """One adapter's update of one kernel of a layer; made by `prepare`."""

    target: str  # the name of the layer, or of the raw parameter
    kernel: Kernel
    config: RandLoraConfig
    scales: Scales  # multiplied by the scaling
    dropout: Dropout | None
    rows: tuple[int, ...] = ()  # the shape of `adapter_ids`, where rows have scales of their own


def prepare(
    target: str,
    kernel: Kernel,
    config: RandLoraConfig,
    bases: Bases,
    scales: Scales,
    dropout: Dropout | None,
    ids: jax.Array | None = None,
) -> Update:
    """An update from one layer's scales.

    Args:
      ids: of the adapters of rows, if the scales are a table's.

    Raises:
      ValueError: naming the target, where kernel, scales, bases and config don't fit.
    """
    try:
        check_rank(config, bases)
        check_fit(bases, kernel.features, [s.shape for s in scales])
    except ValueError as error:
        raise ValueError(f"{target or '(root)'!r}: {error}") from None
    scaling, rows = config.scaling, tuple[int, ...]()
    if ids is not None:
        scales = scales_of_rows(scales, bases[SCALING], ids, len(kernel.stacked))
        scaling, rows = 1.0, ids.shape
    scales = prepare_scales(bases, scales, scaling)
    return Update(target, kernel, config, scales, dropout, rows)
