"""Layers that Flax stacks and torch does not, to PEFT and back, from either side."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

import randlora_jax as rl
from randlora_jax import peft as rl_peft
from randlora_jax.linen import RandLora
from tests.parity.peft_models import (
    MODES,
    NO_COPIES,
    adapted,
    assert_close,
    assert_same_files,
    load_in_peft,
)
from tests.peft_adapters import in_peft, same_trees


class TorchBlocks(torch.nn.Module):
    """Layers that Flax stacks, and a head that it does not."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {
                    "up": torch.nn.Linear(6, 14),
                    "down": torch.nn.Linear(14, 6),
                    "norm": torch.nn.LayerNorm(6),
                }
            )
            for _ in range(4)
        )
        self.head = torch.nn.Linear(6, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer["norm"](x + layer["down"](torch.relu(layer["up"](x))))
        return self.head(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        hidden = nn.relu(nn.Dense(14, name="up")(x))
        return nn.LayerNorm(epsilon=1e-5, name="norm")(x + nn.Dense(6, name="down")(hidden)), None


class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return nn.Dense(5, name="head")(layers(name="layers")(x, None)[0])


stacked = rl_peft.NameMap((("layers.{}", "layers"), ("", "")))


def params_of_blocks(model):
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    stack = lambda name: np.stack([state[f"layers.{i}.{name}"] for i in range(4)])
    dense = lambda name: {
        "kernel": jnp.asarray(stack(f"{name}.weight").swapaxes(1, 2)),
        "bias": jnp.asarray(stack(f"{name}.bias")),
    }
    norm = {"scale": jnp.asarray(stack("norm.weight")), "bias": jnp.asarray(stack("norm.bias"))}
    return {
        "layers": {"up": dense("up"), "down": dense("down"), "norm": norm},
        "head": {
            "kernel": jnp.asarray(state["head.weight"].T),
            "bias": jnp.asarray(state["head.bias"]),
        },
    }


STACKED = {
    "list": {"target_modules": ["up", "down"]},
    "layers": {"target_modules": ["up", "down"], "layers_to_transform": [1, 3],
               "layers_pattern": "layers"},
    "all": {"target_modules": ["up"], "bias": "all", "modules_to_save": ["head"]},
    "own biases": {"target_modules": ["up"], "bias": "randlora_only", "layers_to_transform": [0, 2],
                   "layers_pattern": ["layers"], "modules_to_save": ["norm", "head"]},
}  # fmt: skip


@pytest.mark.parametrize("options", STACKED.values(), ids=STACKED)
def test_stacked_layers_go_there_and_back(options, tmp_path):
    torch.manual_seed(3)
    base, x = TorchBlocks(), torch.randn(7, 6)
    params = params_of_blocks(base)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base, **options)
    model.save_pretrained(tmp_path / "theirs")
    variables, config = rl_peft.load_adapter(tmp_path / "theirs", {"params": params}, stacked)
    assert_close(RandLora(Blocks(), config).apply(variables, x.numpy()), model(x))

    rl_peft.save_adapter(tmp_path / "ours", variables, config, stacked, layout="copies")
    names = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    hidden = {n for n in names if ".modules_to_save." in n or ".original_module." in n}
    assert_same_files(tmp_path / "theirs", tmp_path / "ours", hidden)
    base = TorchBlocks()
    base.load_state_dict(state)
    assert torch.equal(load_in_peft(base, tmp_path / "ours")(x), model(x))


@pytest.mark.parametrize("mode", MODES)
def test_jax_to_peft_to_jax_changes_no_bit_and_no_output(mode, tmp_path):
    torch.manual_seed(4)
    base, x = TorchBlocks(), torch.randn(7, 6)
    params = params_of_blocks(base)
    config = rl.RandLoraConfig(
        r=3, randlora_alpha=6, projection_prng_key=2**31 + 7, target_modules=["up", "down"],
        bias="randlora_only", modules_to_save=["head"], randlora_dropout=0.25, **MODES[mode],
    )  # fmt: skip
    model = RandLora(Blocks(), config, deterministic=True)
    variables = model.adapt({"params": params}, x.numpy())
    trainable, frozen = rl.split(variables, config)
    keys = iter(jax.random.split(jax.random.key(0), 20))
    moved = jax.tree.map(lambda a: a + 0.2 * jax.random.normal(next(keys), a.shape), trainable)
    variables = rl.combine(moved, frozen)

    rl_peft.save_adapter(tmp_path / "ours", variables, config, stacked)
    theirs = load_in_peft(base, tmp_path / "ours", (NO_COPIES,))
    assert_close(model.apply(variables, x.numpy()), theirs(x))

    theirs.save_pretrained(tmp_path / "theirs")
    back, config_back = rl_peft.load_adapter(tmp_path / "theirs", {"params": params}, stacked)
    by_peft = {"inference_mode": False, "auto_mapping": None, "peft_version": None}
    assert config_back.peft_version == peft.__version__ and config_back.inference_mode
    assert config_back.replace(target_modules=("up", "down"), **by_peft) == config.replace(
        target_modules=("up", "down")
    )
    assert sorted(config_back.target_modules) == ["down", "up"]
    assert same_trees(back, in_peft(variables, config))
