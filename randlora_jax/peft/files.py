"""PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`, read and written.

Nothing in them is executed. What is there is not lost when a write fails. Source: what PEFT 0.21.2
writes (`PeftModel.save_pretrained`).
"""

from __future__ import annotations

import json
import os
import re
import shutil

import safetensors
from etils import epath
from safetensors.numpy import save_file

from randlora_jax import atomic
from randlora_jax.checkpoint import orbax_items
from randlora_jax.peft import config_json
from randlora_jax.peft.tensors import Adapter, Layout, adapter_of, tensors_of

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


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
      NotADirectoryError: if it is one of the files.
      ValueError: if they are cut short, not of RandLoRA, or don't fit together; or if the weights
        are a pickle.
    """
    return atomic.read(
        folder_of(directory, adapter_name),
        lambda folder: (folder, _read(folder, directory, adapter_name)),
    )


def _read(folder: epath.Path, directory: str | os.PathLike[str], adapter_name: str) -> Adapter:
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file: give its folder, {str(folder.parent)!r}")
    if not is_adapter(folder):
        parent = epath.Path(directory)
        there = parent.iterdir() if parent.exists() else ()
        inside = sorted(p.name for p in there if p.name[0] != "." and is_adapter(p))
        hint = f", but adapters in it: adapter_name can be one of {inside}" if inside else ""
        if orbax_items.is_adapter(folder):
            hint = ": it is one of this library's, which rl.load_adapter reads"
        elif not parent.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(directory)):
            hint = (
                f", nor anything else. Of a repository of the Hub's, give the folder that "
                f"huggingface_hub.snapshot_download({str(directory)!r}) returns"
            )
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
            return adapter_of(config, file, adapter_name)
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def write(folder: epath.Path, adapter: Adapter, layout: Layout, overwrite: bool) -> int:
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
    if orbax_items.is_adapter(folder):
        raise FileExistsError(f"{folder} is an adapter of this library: give another path")
    foreign = sorted(set(there) - {CONFIG, WEIGHTS, "README.md"})
    if mine and foreign:
        raise FileExistsError(f"{folder} has {foreign[0]!r} too, and is not replaced: empty it")
    try:
        with atomic.written_beside(folder) as new:
            new.mkdir(parents=True)
            save_file(tensors_of(adapter, layout), new / WEIGHTS, {"format": "pt"})
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
