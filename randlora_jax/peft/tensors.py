"""The keys of `adapter_model.safetensors`: what each tensor is, and how it is called.

Everything goes by PEFT's module names here. Source: what PEFT 0.21.2 writes
(`utils/save_and_load.py`), PEFT PR 3714, `inject_adapter_in_model`, and `PeftModel.state_dict()`.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Container, Iterable
from typing import Any, Literal, get_args

import numpy as np

from randlora_jax import targets
from randlora_jax.bases import num_bases
from randlora_jax.config import RandLoraConfig
from randlora_jax.sites import SCALES

BASES = ("randlora_A", "randlora_B")
Layout = Literal["shared", "copies"]  # where a file has the bases
_PREFIX, _MODEL = "base_model.model.", "base_model."
_OWN = re.compile(
    rf"(?:(?P<module>.*)\.)?(?P<leaf>{'|'.join(SCALES + BASES)})(?:\.(?P<adapter>[^.]+))?"
)
# Of `torch.compile`, FSDP and checkpointing: their wrappers' part of the names within them.
_OF_TORCH = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_WRAPPED = re.compile(r"(?P<module>.+)\.(?P<by>modules_to_save|original_module)\.(?P<rest>.+)")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a folder holds; arrays are NumPy's.

    Attributes:
      scales: (lambda (r, n), gamma (n, min(in, out))) of each adapted module.
      bases: `randlora_A` and `randlora_B`, float32; None if there is the seed alone.
      others: (module, name) of what else was trained: biases and `modules_to_save`.
      of_base: (module, name) of the base's weights that PEFT stored too, as it does with those of
        an adapted `lm_head`, or for `save_embedding_layers=True`.
    """

    config: RandLoraConfig
    scales: dict[str, tuple[np.ndarray, np.ndarray]]
    bases: dict[str, np.ndarray] | None
    others: dict[tuple[str, str], np.ndarray]
    of_base: dict[tuple[str, str], np.ndarray] = dataclasses.field(default_factory=dict)


def check_layout(layout: str) -> None:
    if layout not in get_args(Layout):
        raise ValueError(f"layout={layout!r} must be one of {list(get_args(Layout))}")


def tensors_of(adapter: Adapter, layout: Layout) -> dict[str, np.ndarray]:
    """An adapter under PEFT's keys."""
    bases = adapter.bases or {}
    copies = bases if layout == "copies" else {}
    tensors = {_MODEL + name: array for name, array in bases.items()}
    for module, pair in adapter.scales.items():
        own = dict(zip(SCALES, pair, strict=True)) | copies
        tensors |= {f"{_PREFIX}{module}.{leaf}": array for leaf, array in own.items()}
    for (module, leaf), array in adapter.others.items():
        module += ".base_layer" if module in adapter.scales else ""
        tensors[f"{_PREFIX}{module}.{leaf}"] = array
    return {key: np.ascontiguousarray(array) for key, array in tensors.items()}


def adapter_of(config: RandLoraConfig, file: Any, adapter_name: str) -> Adapter:
    """What the tensors of an open file are, in whichever of PEFT's layouts.

    Raises:
      ValueError: if they are not a RandLoRA adapter of this config, whole.
    """
    scales: dict[str, dict[str, np.ndarray]] = {}
    copies: dict[str, list[str]] = {name: [] for name in BASES}
    others = {}
    for (module, leaf), key in _named(config, file.keys(), adapter_name).items():
        if leaf in BASES:
            # The model's own pair comes first: it is loaded last by PEFT, and so counts.
            copies[leaf].insert(0 if module + "." == _MODEL else len(copies[leaf]), key)
        elif leaf in SCALES:
            scales.setdefault(module, {})[leaf] = _as_float(key, file)
        else:
            others[module, leaf] = file.get_tensor(key)
    pairs = {}
    for module, found in scales.items():
        for leaf in SCALES:
            if leaf not in found:
                raise ValueError(f"it lacks the {leaf} of {module!r}")
        pairs[module] = _checked(module, found[SCALES[0]], found[SCALES[1]], config.r)
    if not pairs:
        raise ValueError("it has no randlora_lambda and randlora_gamma: not a RandLoRA adapter")
    bases = _bases(config, file, copies, pairs)
    trained = {at: value for at, value in others.items() if _is_trained(config, at, pairs)}
    of_base = {at: value for at, value in others.items() if at not in trained}
    return Adapter(config, pairs, bases, trained, of_base)


def _named(
    config: RandLoraConfig, keys: Iterable[str], adapter_name: str
) -> dict[tuple[str, str], str]:
    """The key of each (module, name), without what PEFT wraps around them.

    `PeftModel.state_dict()` has the names of adapters in its keys, which are not in PEFT's files.
    """
    names = {key: _unwrapped(key).removeprefix(_PREFIX) for key in sorted(keys)}
    ours = {key: match for key, name in names.items() if (match := _OWN.fullmatch(name))}
    adapters = sorted({match["adapter"] for match in ours.values() if match["adapter"]})
    chosen = adapters[0] if len(adapters) == 1 else adapter_name
    if adapters and chosen not in adapters:
        raise ValueError(f"it has adapters called {adapters}: adapter_name must be one of them")
    named: dict[tuple[str, str], str] = {}
    for key, name in names.items():
        if own := ours.get(key):
            if own["adapter"] in (None, chosen):
                other = named.setdefault((own["module"] or "", own["leaf"]), key)
                if other != key:
                    raise ValueError(f"{other} and {key} are the same: leave one of them out")
            continue
        wrapped = _WRAPPED.fullmatch(name)
        if wrapped and targets.is_saved_whole(config, wrapped["module"]):
            own_part = wrapped["rest"].removeprefix(chosen + ".")
            if not adapters or wrapped["by"] == "original_module" or own_part == wrapped["rest"]:
                continue  # what counts nothing, or what bias="all" has written once more
            name = f"{wrapped['module']}.{own_part}"
        module, _, leaf = name.rpartition(".")
        named[module.removesuffix(".base_layer"), leaf] = key
    return named


def _unwrapped(key: str) -> str:
    """A key without what torch's wrappers, or those for several devices around all, put into it."""
    name = _OF_TORCH.sub("", key)
    return name.removeprefix("module.") if name.startswith("module." + _MODEL) else name


def _is_trained(config: RandLoraConfig, at: tuple[str, str], adapted: Container[str]) -> bool:
    module, leaf = at
    by_bias = ("all", "randlora_only") if module in adapted else ("all",)
    is_bias = leaf == "bias" and config.bias in by_bias
    return is_bias or targets.is_saved_whole(config, module)


def _checked(module, lam, gamma, r):
    n = num_bases(gamma.shape[-1], r) if gamma.ndim == 2 and gamma.shape[-1] else 0
    if lam.shape != (r, n) or gamma.shape[0] != n:
        raise ValueError(
            f"{module!r} has a randlora_lambda of {lam.shape} and a randlora_gamma of "
            f"{gamma.shape}, which r={r} does not give: wanted (r, n) and (n, d), n = ceil(d / r)"
        )
    return lam, gamma


def _bases(config, file, copies, pairs):
    if not any(copies.values()):
        return None
    bases = {}
    for name, keys in copies.items():
        if not keys:
            raise ValueError(f"it has one of {BASES[0]} and {BASES[1]} and lacks {name}")
        first = bases[name] = _as_float(keys[0], file)
        for key in keys[1:]:
            if np.array_equal(first, _as_float(key, file), equal_nan=True):
                continue
            if not _unwrapped(keys[0]).startswith(_MODEL + name):
                raise ValueError(f"{key} is not {keys[0]}, and there is no {_MODEL + name} to tell")
            warnings.warn(f"{key} is not {keys[0]}, which is taken, as PEFT does", stacklevel=8)
            break
    A, B = (bases[name] for name in BASES)
    width = max(gamma.shape[1] for _, gamma in pairs.values())
    fits = A.ndim == B.ndim == 3 and A.shape[:2] == (config.r, 1) and B.shape[2] == config.r
    if not fits or A.shape[2] < width or B.shape[1] < num_bases(width, config.r):
        raise ValueError(
            f"randlora_A of {A.shape} and randlora_B of {B.shape} don't fit r={config.r} and "
            f"layers that need ({config.r}, 1, {width}) and (..., "
            f"{num_bases(width, config.r)}, {config.r}) at least"
        )
    if not config.save_projection:
        warnings.warn(
            "the file has its bases although its config says save_projection=False, where PEFT "
            "would take no notice of them: they are taken",
            stacklevel=8,
        )
    return bases


def _as_float(key, file) -> np.ndarray:
    """A tensor in float32, to which float16 and bfloat16 are exact; float64 stays."""
    array = file.get_tensor(key)
    kind = file.get_slice(key).get_dtype()
    if kind not in ("F16", "BF16", "F32", "F64"):
        raise ValueError(f"{key} has dtype {kind}, which is no floating point number of PEFT's")
    return array if kind in ("F32", "F64") else array.astype(np.float32)
