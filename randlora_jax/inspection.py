"""Reading an adapter's folder without a base, PEFT's or ours: for the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from randlora_jax import atomic, trees
from randlora_jax import bases as bases_lib
from randlora_jax.checkpoint import orbax_items
from randlora_jax.config import RandLoraConfig
from randlora_jax.peft import files, torch_bases
from randlora_jax.peft.exporting import dense_bases
from randlora_jax.peft.importing import compact_bases
from randlora_jax.peft.tensors import BASES
from randlora_jax.stored import scale_pairs

PEFT, OURS = "PEFT", "randlora_jax"


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """An adapter of either kind, read and checked, without a base.

    Attributes:
      scales: (lambda, gamma) by the name of the layer.
      bases: None where there is only a seed, and no base to tell their size.
      stored: whether the bases are in the files.
      content: as it was read.
      shared_dims: the sizes that PEFT gives the bases, if others.
    """

    kind: str
    folder: epath.Path
    config: RandLoraConfig
    scales: dict[str, tuple[Any, Any]]
    bases: dict[str, Any] | None
    stored: bool
    content: Any
    shared_dims: Sequence[int] | None = None


def read_folder(path: str, adapter_name: str) -> AdapterFolder:
    """Reads an adapter folder, PEFT's or ours.

    Raises:
      FileNotFoundError: if it is neither.
      ValueError: if it is damaged.
    """
    ours = epath.Path(path)
    if orbax_items.is_adapter(atomic.present(ours)):
        return atomic.read(ours, _open_ours)
    folder, adapter = files.read_adapter(path, adapter_name)
    config, stored = adapter.config, adapter.bases is not None
    bases = compact_bases(adapter.bases, config) if adapter.bases is not None else None
    return AdapterFolder(PEFT, folder, config, adapter.scales, bases, stored, adapter)


def _open_ours(folder: epath.Path) -> AdapterFolder:
    content, manifest = orbax_items.read_adapter(folder)
    config, bases = manifest.config, content["randlora_bases"]
    scales = {trees.dotted(path): pair for path, pair in scale_pairs(content["randlora"])}
    held, shared = manifest.holds_bases, manifest.bases.shared_dims
    return AdapterFolder(OURS, folder, config, scales, bases, held, content, shared)


def drawn_by(config: RandLoraConfig, bases: dict[str, Any]) -> str | None:
    """Which generator draws exactly these bases from the config's seed; None if none does."""
    bases = dense_bases(bases)
    A, B = (bases[name] for name in BASES)
    sizes = B.shape[0], A.shape[2]
    same = lambda drawn: all(np.array_equal(drawn[name], bases[name]) for name in BASES)
    if same(dense_bases(bases_lib.draw(config, *sizes))):
        return f"jax, {bases_lib.GENERATOR}"
    drawn = torch_bases.draw(config, *sizes)
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):  # a base's dtype can round them
        if same({n: a.astype(dtype).astype(np.float32) for n, a in drawn.items()}):
            rounded = "" if dtype is np.float32 else f", rounded to {np.dtype(dtype)}"
            return f"torch >= 2.12{rounded}"
    return None
