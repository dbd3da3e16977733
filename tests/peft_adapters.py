"""The golden adapters that PEFT wrote: how they are loaded, changed and compared."""

import json
import pathlib
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from randlora_jax import peft
from randlora_jax.bases import resized, shared_dims
from randlora_jax.peft import files
from randlora_jax.stored import sites_of

GOLDEN = pathlib.Path(__file__).parent / "golden"
ADAPTERS = sorted(folder.name for folder in GOLDEN.glob("adapter_*"))
WEIGHTS, CONFIG = files.WEIGHTS, files.CONFIG


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(20, name="lin0")(x))
        return nn.Dense(8, name="lin2")(nn.relu(nn.Dense(20, name="lin1")(x)))


def golden_base(name="adapter_projection"):
    """(variables of the base, x, PEFT's y, PEFT's bases)"""
    io = load_file(GOLDEN / name / "io.safetensors")
    params = {
        f"lin{i}": {
            "kernel": jnp.asarray(io[f"lin{i}.weight"].T),
            "bias": jnp.asarray(io[f"lin{i}.bias"]),
        }
        for i in range(3)
    }
    return (
        {"params": params},
        io["x"],
        io["y"],
        {f"randlora_{n}": io[f"randlora_{n}"] for n in "AB"},
    )


def golden_copy(tmp_path, name="adapter_projection"):
    """A copy of a golden adapter to change."""
    shutil.copytree(GOLDEN / name, tmp_path / "adapter")
    return tmp_path / "adapter"


def load(folder, name_map=None, name="adapter_projection", **options):
    return peft.load_adapter(folder, golden_base(name)[0], name_map, **options)


def rewrite(folder, change):
    """Changes the tensors of an adapter in place."""
    tensors = load_file(folder / WEIGHTS)
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, folder / WEIGHTS)


def rewrite_config(folder, **changes):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))


def in_peft(variables, config):
    """Adapted variables with bases of the sizes that PEFT gives them, as its files have them."""
    features = [site.kernel.features for site in sites_of(variables, config, guess=True)]
    bases = resized(config, variables["randlora_bases"], *shared_dims(features))
    return {**variables, "randlora_bases": bases}


def same_trees(one, other):
    same = lambda a, b: a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return jax.tree.all(jax.tree.map(same, one, other))


def close(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()


def dense_bases(variables):
    bases = {name: np.asarray(array) for name, array in variables["randlora_bases"].items()}
    sizes = bases.get("randlora_scale", np.ones(2, np.float32))
    names = ("randlora_A", "randlora_B")
    return {n: bases[n].astype(np.float32) * s for n, s in zip(names, sizes, strict=True)}
