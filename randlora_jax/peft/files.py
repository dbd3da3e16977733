"""PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`, read and written.

Everything goes by PEFT's module names here; `peft` puts it into a Flax tree. Source: what PEFT
0.21.2 writes (`utils/save_and_load.py`), PEFT PR 3714, and `inject_adapter_in_model`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import warnings

import numpy as np
import safetensors
from etils import epath
from safetensors.numpy import save_file

from randlora_jax import atomic, targets
from randlora_jax.bases import num_bases
from randlora_jax.config import RandLoraConfig
from randlora_jax.peft import config_json
from randlora_jax.sites import SCALES

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BASES = ("randlora_A", "randlora_B")
_PREFIX, _MODEL = "base_model.model.", "base_model."


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a folder holds; arrays are NumPy's.

    Attributes:
      scales: (lambda (r, n), gamma (n, min(in, out))) of each adapted module.
      bases: `randlora_A` and `randlora_B`, float32; None if there is the seed alone.
      others: (module, name) of what else was trained: biases and `modules_to_save`.
    """

    config: RandLoraConfig
    scales: dict[str, tuple[np.ndarray, np.ndarray]]
    bases: dict[str, np.ndarray] | None
    others: dict[tuple[str, str], np.ndarray]


def folder_of(directory: str | os.PathLike[str], adapter_name: str = "default") -> epath.Path:
    """Where an adapter of that name is: PEFT has "default" in the folder, others in sub-folders."""
    if adapter_name in ("", ".", "..") or re.search(r"[/\\:\0]", adapter_name):
        raise ValueError(f"adapter_name={adapter_name!r} must be a plain name, with no path in it")
    folder = epath.Path(directory)
    return folder if adapter_name == "default" else folder / adapter_name


def is_adapter(folder: epath.Path) -> bool:
    """Whether there is an adapter of PEFT's in the folder."""
    return (folder / CONFIG).is_file()


def read_adapter(
    directory: str | os.PathLike[str], adapter_name: str = "default"
) -> tuple[epath.Path, Adapter]:
    """Reads and checks an adapter, in whichever of PEFT's layouts; nothing in it is executed.

    Returns:
      (folder, adapter), the folder that it was read from.

    Raises:
      FileNotFoundError: if one of the two files is missing; it names adapters in sub-folders.
      ValueError: if they are cut short, not of RandLoRA, or don't fit together; or if the weights
        are a pickle.
    """
    return atomic.read(
        folder_of(directory, adapter_name), lambda folder: (folder, _read(folder, directory))
    )


def _read(folder: epath.Path, directory: str | os.PathLike[str]) -> Adapter:
    if not is_adapter(folder):
        parent = epath.Path(directory)
        there = parent.iterdir() if parent.exists() else ()
        inside = sorted(p.name for p in there if p.name[0] != "." and is_adapter(p))
        hint = f", but adapters in it: adapter_name can be one of {inside}" if inside else ""
        if (folder / "_METADATA").exists():
            hint = ": it looks like one of this library's, which rl.load_adapter reads"
        raise FileNotFoundError(f"{folder} is no adapter of PEFT's: it has no {CONFIG}{hint}")
    config = config_json.read_config(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLED).exists():
            raise ValueError(
                f"{folder / PICKLED} is a pickle, which can execute code when it is read, and is "
                f"refused: save it again with PEFT, as {WEIGHTS} (safe_serialization=True)"
            )
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}")
    try:
        with safetensors.safe_open(path, "np") as file:
            return _parse(config, file)
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _parse(config: RandLoraConfig, file) -> Adapter:
    scales: dict[str, dict[str, np.ndarray]] = {}
    copies: dict[str, list[str]] = {name: [] for name in BASES}
    others = {}
    for key in sorted(file.keys()):
        module, _, leaf = key.removeprefix(_PREFIX).rpartition(".")
        if leaf in BASES:
            # The model's own pair comes first: it is loaded last by PEFT, and so counts.
            copies[leaf].insert(0 if key == _MODEL + leaf else len(copies[leaf]), key)
        elif leaf in SCALES:
            scales.setdefault(module, {})[leaf] = _as_float(key, file)
        else:
            others[module, leaf] = key
    pairs = {}
    for module, found in scales.items():
        for leaf in SCALES:
            if leaf not in found:
                raise ValueError(f"it lacks the {leaf} of {module!r}")
        pairs[module] = _checked(module, found[SCALES[0]], found[SCALES[1]], config.r)
    if not pairs:
        raise ValueError("it has no randlora_lambda and randlora_gamma: not a RandLoRA adapter")
    bases = _read_bases(config, file, copies, pairs)
    return Adapter(config, pairs, bases, _read_others(config, file, others, pairs))


def _checked(module, lam, gamma, r):
    n = num_bases(gamma.shape[-1], r) if gamma.ndim == 2 and gamma.shape[-1] else 0
    if lam.shape != (r, n) or gamma.shape[0] != n:
        raise ValueError(
            f"{module!r} has a randlora_lambda of {lam.shape} and a randlora_gamma of "
            f"{gamma.shape}, which r={r} does not give: wanted (r, n) and (n, d), n = ceil(d / r)"
        )
    return lam, gamma


def _read_bases(config, file, copies, pairs):
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
            if keys[0] != _MODEL + name:
                raise ValueError(f"{key} is not {keys[0]}, and there is no {_MODEL + name} to tell")
            warnings.warn(f"{key} is not {keys[0]}, which is taken, as PEFT does", stacklevel=5)
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
            stacklevel=5,
        )
    return bases


def _read_others(config, file, others, pairs):
    found = {}
    for (module, leaf), key in others.items():
        own = module.removesuffix(".base_layer")
        hidden = re.match(r"(.+)\.(modules_to_save|original_module)(\.|$)", module)
        if hidden and leaf == "bias" and targets.is_saved_whole(config, hidden[1]):
            continue  # bias="all" writes it again, under names that say what counts nothing
        trained = ("all", "randlora_only") if own in pairs else ("all",)
        is_bias = leaf == "bias" and config.bias in trained
        if not is_bias and not targets.is_saved_whole(config, own):
            raise ValueError(
                f"it has {key!r}, which neither modules_to_save={config.modules_to_save!r} nor "
                f"bias={config.bias!r} accounts for: if it was trained, say so in {CONFIG}"
            )
        found[own, leaf] = file.get_tensor(key)
    return found


def _as_float(key, file) -> np.ndarray:
    """A tensor in float32, to which float16 and bfloat16 are exact; float64 stays."""
    array = file.get_tensor(key)
    kind = file.get_slice(key).get_dtype()
    if kind not in ("F16", "BF16", "F32", "F64"):
        raise ValueError(f"{key} has dtype {kind}, which is no floating point number of PEFT's")
    return array if kind in ("F32", "F64") else array.astype(np.float32)


def write(folder: epath.Path, adapter: Adapter, overwrite: bool) -> int:
    """Writes an adapter beside its place and moves it there when it is complete: bytes written.

    Raises:
      FileExistsError: if there is an adapter and `overwrite` is False, or anything beside it.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder")
    there = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    mine = [name for name in there if name in (CONFIG, WEIGHTS, PICKLED)]
    if mine and not overwrite:
        raise FileExistsError(
            f"{folder} has {mine[0]} already: give another path or overwrite=True"
        )
    foreign = sorted(set(there) - {CONFIG, WEIGHTS, "README.md"})
    if mine and foreign:
        raise FileExistsError(f"{folder} has {foreign[0]!r} too, and is not replaced: empty it")
    try:
        with atomic.written_beside(folder) as new:
            new.mkdir(parents=True)
            save_file(_tensors(adapter), new / WEIGHTS, {"format": "pt"})
            values = config_json.content(adapter.config)
            (new / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True))
            size = os.path.getsize(new / WEIGHTS)
            if there and not mine:  # adapters in sub-folders, or a README
                for name in (WEIGHTS, CONFIG):  # it is an adapter once it has both
                    os.replace(new / name, folder / name)
                return size
            if (folder / "README.md").exists():
                shutil.copy2(folder / "README.md", new)
            atomic.take_place(new, folder)
            return size
    except safetensors.SafetensorError as error:  # a full disk, among others
        raise OSError(f"{folder} could not be written: {error}") from None


def _tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """PEFT's keys. Its loader misses the bases where a layer has no copy, so all have one."""
    bases = adapter.bases or {}
    tensors = {_MODEL + name: array for name, array in bases.items()}
    for module, pair in adapter.scales.items():
        own = dict(zip(SCALES, pair, strict=True)) | bases
        tensors |= {f"{_PREFIX}{module}.{leaf}": array for leaf, array in own.items()}
    for (module, leaf), array in adapter.others.items():
        module += ".base_layer" if module in adapter.scales else ""
        tensors[f"{_PREFIX}{module}.{leaf}"] = array
    return {key: np.ascontiguousarray(array) for key, array in tensors.items()}
