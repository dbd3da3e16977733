"""Looks at adapters on disk, converts them, and verifies them.

Exit codes: 0 all is well; 1 the adapter is damaged, can't be converted so, or is not what its seed
draws; 2 wrong usage, as a path with no adapter; 3 the adapter is intact, and has a seed alone, so
that there is nothing to verify.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Sequence
from typing import get_args

import numpy as np
from etils import epath

from randlora_jax import bases as bases_lib
from randlora_jax import checkpoint
from randlora_jax.checkpoint import manifest
from randlora_jax.config import RandLoraConfig
from randlora_jax.inspection import OURS, PEFT, AdapterFolder, drawn_by, read_folder
from randlora_jax.peft import (
    NameMap,
    files,
    gemma_name_map,
    gpt2_name_map,
    llama_name_map,
    tunix_name_map,
)
from randlora_jax.peft.exporting import to_peft
from randlora_jax.peft.importing import from_peft
from randlora_jax.peft.tensors import BASES, Layout
from randlora_jax.tables import readable, table_of

NAMES: dict[str, NameMap | None] = {
    "same": None,
    "gemma": gemma_name_map,
    "gpt2": gpt2_name_map,
    "llama": llama_name_map,
    "tunix": tunix_name_map,
}


class WrongUsage(ValueError):
    """What was asked can't be meant."""


# What messages tell a user of Python to write, and what it is in a shell.
_IN_A_SHELL = {
    "overwrite=True": "--overwrite",
    "adapter_name=": "--adapter ",
    "adapter_name": "--adapter",
    "name_map": "--names",
    "jax_enable_x64": "JAX_ENABLE_X64=1",
}


def inspect(adapter: AdapterFolder) -> str:
    """A table of what an adapter is."""
    config = adapter.config
    size = sum(os.path.getsize(p) for p in pathlib.Path(adapter.folder).rglob("*") if p.is_file())
    defaults = RandLoraConfig()
    rows, trains = [], 0
    for name, pair in sorted(adapter.scales.items()):
        count = sum(np.size(array) for array in pair)
        trains += count
        rows.append((name, *(str(np.shape(array)) for array in pair), f"{count:,}"))
    facts = [("kind", f"{adapter.kind}, {readable(size)} on disk"), ("r", str(config.r))]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name != "r" and value != getattr(defaults, field.name):
            facts.append((field.name, repr(value)))
    facts.append(("projection_prng_key", str(config.projection_prng_key)))
    facts.append(("scales", f"{trains:,} numbers in {len(rows)} layers"))
    if adapter.bases is None:
        facts.append(("bases", "a seed only: which torch drew them, the file does not say"))
    else:
        shapes = [str(np.shape(adapter.bases[name])) for name in BASES]
        where = "in the file" if adapter.stored else "drawn again from the seed"
        held = readable(bases_lib.nbytes(adapter.bases))
        facts.append(("bases", f"{' and '.join(shapes)}, {held}, {where}"))
        drawn = drawn_by(config, adapter.bases) or "unknown: not what the seed draws"
        facts.append(("drawn by", drawn))
        for name, fingerprint in manifest.fingerprints(adapter.bases).items():
            facts.append((f"fingerprint {name}", fingerprint))
    table = table_of([("layer", "lambda", "gamma", "trains"), *rows], right=(3,))
    return "\n".join([*table_of(list(dict(facts).items())), "", *table])


def convert(
    adapter: AdapterFolder, target: str, names: NameMap | None, layout: Layout, overwrite: bool
) -> str:
    """Writes a PEFT adapter as ours, or ours as PEFT's: what was written, in words."""
    if adapter.kind == PEFT:
        if adapter.content.others or adapter.content.of_base:
            raise ValueError(
                "it has weights of its base (biases, modules_to_save, embeddings), which need the "
                "base here: use peft.load_adapter, in Python"
            )
        variables, config, _ = from_peft(adapter.content, names, None)
        checkpoint.save_adapter(target, {"params": {}, **variables}, config, overwrite=overwrite)
        return f"{target}: an adapter of {OURS}"
    content, dims = {"params": {}, **adapter.content}, adapter.shared_dims
    exported = to_peft(content, adapter.config, names, shared_dims=dims)
    size = files.write(epath.Path(target), exported, layout, overwrite)
    pair = bases_lib.nbytes(exported.bases or {})
    held = f"{readable(pair)} of it the bases"
    if layout == "copies":
        held = f"{readable(pair * len(exported.scales))} of it copies of the bases"
    return f"{target}: an adapter of PEFT, {readable(size)}, {held}"


def name_map_of(given: str) -> NameMap | None:
    """A ready map by its name, or what a file of JSON says: names of PEFT's, and places here.

    Raises:
      WrongUsage: if it is neither.
    """
    if given in NAMES:
        return NAMES[given]
    try:
        found = json.loads(pathlib.Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WrongUsage(
            f"--names {given} is none of {', '.join(sorted(NAMES))}, and no file of JSON: {error}"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(place, str) for place in found.values()):
        raise WrongUsage(
            f"--names {given} must hold an object of names and places, as "
            '{"model.layers.{}": "layers"}'
        )
    return NameMap(tuple(found.items()))


def verify(adapter: AdapterFolder) -> tuple[int, str]:
    """(exit code, verdict): whether the bases are what the seed draws."""
    seed = f"projection_prng_key={adapter.config.projection_prng_key}"
    if adapter.bases is None:
        return 3, (
            f"its files are intact, and it has no bases to compare with what {seed} draws: torch "
            "draws them where it is loaded, and torch <= 2.11 others than later ones unless sparse"
        )
    generator = drawn_by(adapter.config, adapter.bases)
    if generator is None:
        why = f"neither jax nor torch >= 2.12 draws its bases from {seed}: keep them in the file"
        return 1, why
    return 0, f"its bases are those that {seed} draws ({generator})"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line: the exit code."""
    parser = argparse.ArgumentParser("randlora", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, described in (
        ("inspect", "show config, layers, sizes, seed and fingerprints"),
        ("convert", "write PEFT's adapter as ours, or ours as PEFT's"),
        ("verify", "check the files, and that the seed draws the bases"),
    ):
        command = commands.add_parser(name, help=described, description=described)
        command.add_argument("path", help="an adapter's folder, PEFT's or ours")
        if name == "convert":
            command.add_argument("target", help="a new folder")
            command.add_argument(
                "--names",
                default="same",
                help="how PEFT's modules are called in the Flax model: one of "
                f"{', '.join(sorted(NAMES))}, or a file of JSON with what NameMap takes, "
                '{"model.layers.{}": "layers", ...}',
            )
            command.add_argument(
                "--layout",
                choices=get_args(Layout),
                default="shared",
                help="where PEFT's file has the bases: once, or beside every layer too",
            )
            command.add_argument("--overwrite", action="store_true")
        command.add_argument("--adapter", default="default", help="which of PEFT's sub-folders")
    args = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        complain = lambda text, *_, **__: print(in_a_shell(str(text)), file=sys.stderr)
        warnings.showwarning = lambda text, *_, **__: complain(f"note: {text}")
        try:
            code, text = run(args)
        except (WrongUsage, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
            complain(error)
            return 2
        except (ValueError, OSError) as error:
            complain(error)
            return 1
    print(text)
    return code


def in_a_shell(message: str) -> str:
    """A message with flags in place of the arguments that Python has for them."""
    words = "|".join(_IN_A_SHELL)  # a longer one comes before its beginning
    # Not as a part of a path or of a quoted name.
    pattern = rf"(?<![\w'\"./\\-])({words})(?![\w/\\-]|\.\w)"
    return re.sub(pattern, lambda word: _IN_A_SHELL[word[0]], message)


def run(args: argparse.Namespace) -> tuple[int, str]:
    """(exit code, what to print) of one command."""
    try:
        files.folder_of(args.path, args.adapter)
    except ValueError as error:
        raise WrongUsage(error) from None
    names = name_map_of(args.names) if args.command == "convert" else None
    adapter = read_folder(args.path, args.adapter)
    if args.command == "inspect":
        return 0, inspect(adapter)
    if args.command == "convert":
        return 0, convert(adapter, args.target, names, args.layout, args.overwrite)
    return verify(adapter)
