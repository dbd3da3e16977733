"""Adapters that move between PEFT and this library, against PEFT itself: bits, outputs, steps."""

import json
import random
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers.pytorch_utils import Conv1D

import randlora_jax as rl
from randlora_jax import peft as rl_peft
from randlora_jax.linen import RandLora
from randlora_jax.peft import torch_bases

MODES = {"dense": {}, "sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}


class TorchMLP(torch.nn.Module):
    """in < out, in = out, in > out."""

    def __init__(self, linear=torch.nn.Linear):
        super().__init__()
        self.lin0, self.lin1, self.lin2 = linear(10, 20), linear(20, 20), linear(20, 8)

    def forward(self, x):
        return self.lin2(torch.relu(self.lin1(torch.relu(self.lin0(x)))))


def conv1d(in_features, out_features):
    return Conv1D(out_features, in_features)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(20, name="lin0")(x))
        return nn.Dense(8, name="lin2")(nn.relu(nn.Dense(20, name="lin1")(x)))


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


def params_of(model):
    """A torch MLP's parameters for the Flax one."""
    state = {name: jnp.asarray(value.numpy()) for name, value in model.state_dict().items()}
    kernel = lambda name: state[name] if isinstance(model.lin0, Conv1D) else state[name].T
    return {
        f"lin{i}": {"kernel": kernel(f"lin{i}.weight"), "bias": state[f"lin{i}.bias"]}
        for i in range(3)
    }


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


def adapted(base, **options):
    """PEFT's model around a base, everything that trains moved away from its start."""
    config = peft.RandLoraConfig(**{"r": 4, "randlora_alpha": 8, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the config: save_projection=False, fan_in_fan_out
        model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def load_in_peft(base, folder, **options):
    """What PEFT makes of an adapter, where none of its warnings may appear."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(base, folder, **options)


def assert_same_files(one, other, ignored=()):
    """The same tensors, bit for bit, and the same config."""
    tensors, others = (load_file(f / "adapter_model.safetensors") for f in (one, other))
    assert set(tensors) - set(ignored) == set(others)
    for name, array in others.items():
        assert array.dtype == tensors[name].dtype and array.shape == tensors[name].shape
        assert array.tobytes() == tensors[name].tobytes(), name
    values, other_values = (
        json.loads((f / "adapter_config.json").read_text()) for f in (one, other)
    )
    for config in (values, other_values):  # PEFT writes sets in arbitrary order
        for key in ("target_modules", "modules_to_save"):
            config[key] = sorted(config[key]) if isinstance(config[key], list) else config[key]
    assert values == other_values


def assert_close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_bases_are_those_of_peft_on_50_random_configurations():
    rng = random.Random(0)
    for number in range(50):
        mode = MODES[list(MODES)[number % 3]]
        sides, r = (
            (rng.randint(1, 140), rng.randint(1, 140)),
            rng.choice([1, 2, 3, 4, 7, 8, 16, 32, 50]),
        )
        seed = rng.choice([rng.randrange(100), rng.randrange(2**63), -rng.randrange(1, 2**40)])
        options = {"r": r, "projection_prng_key": seed, "target_modules": ["0"], **mode}
        model = adapted(torch.nn.Sequential(torch.nn.Linear(*sides)), **options).base_model
        ours = torch_bases.draw(rl.RandLoraConfig(**options), max(sides), min(sides))
        for name, theirs in (("randlora_A", model.randlora_A), ("randlora_B", model.randlora_B)):
            theirs = theirs["default"].numpy()
            assert ours[name].dtype == theirs.dtype and ours[name].shape == theirs.shape
            assert ours[name].tobytes() == theirs.tobytes(), (options, sides, name)


@pytest.mark.parametrize("mode", MODES)
def test_large_bases_are_those_of_peft(mode):
    options = {"r": 32, "projection_prng_key": 3, "target_modules": ["0"], **MODES[mode]}
    model = adapted(torch.nn.Sequential(torch.nn.Linear(2048, 3072)), **options).base_model
    ours = torch_bases.draw(rl.RandLoraConfig(**options), 3072, 2048)
    assert ours["randlora_B"].tobytes() == model.randlora_B["default"].numpy().tobytes()


CASES = {
    "list": {"target_modules": ["lin0", "lin1", "lin2"]},
    "regex": {"target_modules": "lin[02]", "projection_prng_key": 5},
    "sparse": {"target_modules": ["lin1", "lin2"], "sparse": True, "r": 3},
    "very_sparse": {"target_modules": ["lin0", "lin1"], "very_sparse": True, "r": 7},
    "biases": {"target_modules": ["lin0", "lin1"], "bias": "randlora_only"},
    "all biases": {"target_modules": ["lin1"], "bias": "all"},
    "saved module": {"target_modules": ["lin0"], "modules_to_save": ["lin2"]},
    "dropout": {"target_modules": ["lin0"], "randlora_dropout": 0.1, "init_weights": False},
}  # fmt: skip


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_peft_to_jax_to_peft_changes_no_bit_and_no_output(options, tmp_path):
    torch.manual_seed(0)
    base = TorchMLP()
    params, x = params_of(base), torch.randn(6, 10)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base, **options)
    model.save_pretrained(tmp_path / "theirs")
    model.eval()

    variables, config = rl_peft.load_adapter(tmp_path / "theirs", {"params": params})
    assert_close(RandLora(MLP(), config, deterministic=True).apply(variables, x.numpy()), model(x))

    rl_peft.save_adapter(tmp_path / "ours", variables, config)
    hidden = {f"base_model.model.lin2.{n}.bias" for n in ("modules_to_save", "original_module")}
    assert_same_files(tmp_path / "theirs", tmp_path / "ours", hidden)
    base = TorchMLP()
    base.load_state_dict(state)
    assert torch.equal(load_in_peft(base, tmp_path / "ours")(x), model(x))


@pytest.mark.filterwarnings("ignore:Specified to not save basis_A")
def test_without_projections_the_redrawn_bases_give_the_same_outputs(tmp_path):
    torch.manual_seed(1)
    base, x = TorchMLP(), torch.randn(6, 10)
    params = params_of(base)
    model = adapted(base, target_modules=["lin0", "lin2"], save_projection=False)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="torch >= 2.12"):
        variables, config = rl_peft.load_adapter(tmp_path, {"params": params})
    assert_close(RandLora(MLP(), config).apply(variables, x.numpy()), model(x))
    for name in ("randlora_A", "randlora_B"):
        theirs = getattr(model.base_model, name)["default"].numpy()
        assert np.asarray(variables["randlora_bases"][name]).tobytes() == theirs.tobytes()


def test_conv1d_adapts_alike(tmp_path):
    torch.manual_seed(2)
    base, x = TorchMLP(conv1d), torch.randn(6, 10)
    torch.nn.init.normal_(base.lin2.weight)
    params = params_of(base)
    # Both in > out and in < out; lin2's weight is trained whole, and is stored (in, out).
    model = adapted(base, target_modules=["lin0", "lin1"], modules_to_save=["lin2"], bias="all",
                    fan_in_fan_out=True)  # fmt: skip
    model.save_pretrained(tmp_path)
    variables, config = rl_peft.load_adapter(tmp_path, {"params": params})
    assert config.fan_in_fan_out
    assert_close(RandLora(MLP(), config).apply(variables, x.numpy()), model(x))


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

    rl_peft.save_adapter(tmp_path / "ours", variables, config, stacked)
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

    size = rl_peft.save_adapter(tmp_path / "ours", variables, config, stacked)
    assert size == (tmp_path / "ours" / "adapter_model.safetensors").stat().st_size
    theirs = load_in_peft(base, tmp_path / "ours")
    assert_close(model.apply(variables, x.numpy()), theirs(x))

    theirs.save_pretrained(tmp_path / "theirs")
    back, config_back = rl_peft.load_adapter(tmp_path / "theirs", {"params": params}, stacked)
    by_peft = {"inference_mode": False, "auto_mapping": None, "peft_version": None}
    assert config_back.peft_version == peft.__version__ and config_back.inference_mode
    assert config_back.replace(target_modules=("up", "down"), **by_peft) == config.replace(
        target_modules=("up", "down")
    )
    assert sorted(config_back.target_modules) == ["down", "up"]
    same = lambda a, b: a.dtype == b.dtype and bool((a == b).all())
    assert jax.tree.all(jax.tree.map(same, back, variables))


def test_targets_that_peft_has_no_words_for_become_names(tmp_path):
    torch.manual_seed(5)
    base, x = TorchMLP(), torch.randn(6, 10)
    params = params_of(base)
    config = rl.RandLoraConfig(r=4, target_modules="all-linear", exclude_modules=["lin1"])
    model = RandLora(MLP(), config)
    variables = model.adapt({"params": params}, x.numpy())
    scales = jax.tree.map(lambda a: a + 0.1, variables["randlora"])
    variables = {**variables, "randlora": scales}
    rl_peft.save_adapter(tmp_path, variables, config)
    theirs = load_in_peft(base, tmp_path)
    assert theirs.peft_config["default"].target_modules == {"lin0", "lin2"}
    assert_close(model.apply(variables, x.numpy()), theirs(x))


def test_adapters_in_sub_folders(tmp_path):
    torch.manual_seed(6)
    base, x = TorchMLP(), torch.randn(6, 10)
    params = params_of(base)
    model = adapted(base, target_modules=["lin0", "lin1"])
    model.add_adapter("other", peft.RandLoraConfig(r=4, target_modules=["lin1"]))
    model.save_pretrained(tmp_path / "theirs")
    for name in ("default", "other"):
        folder = tmp_path / "theirs"
        variables, config = rl_peft.load_adapter(folder, {"params": params}, adapter_name=name)
        model.set_adapter(name)
        assert_close(RandLora(MLP(), config).apply(variables, x.numpy()), model(x))
        rl_peft.save_adapter(tmp_path / "ours", variables, config, adapter_name=name)
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    # PEFT adds bases to a layer that this adapter does not adapt, since the other one does.
    idle = {f"base_model.model.lin0.randlora_{name}" for name in "AB"}
    assert_same_files(tmp_path / "theirs" / "other", tmp_path / "ours" / "other", idle)


def test_direct_injection(tmp_path):
    torch.manual_seed(7)
    base, x = TorchMLP(), torch.randn(6, 10)
    params = params_of(base)
    config = peft.RandLoraConfig(r=4, target_modules=["lin0", "lin2"])
    model = peft.inject_adapter_in_model(config, base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    state = peft.get_peft_model_state_dict(model)
    assert "lin0.randlora_A" in state
    save_file({k: v.numpy() for k, v in state.items()}, tmp_path / "adapter_model.safetensors")
    config.save_pretrained(tmp_path)
    variables, config = rl_peft.load_adapter(tmp_path, {"params": params})
    assert_close(RandLora(MLP(), config).apply(variables, x.numpy()), model(x))


def test_one_pair_for_the_model(tmp_path):
    torch.manual_seed(8)
    base, x = TorchMLP(), torch.randn(6, 10)
    params = params_of(base)
    model = adapted(base, target_modules=["lin0", "lin2"])
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layers = tuple(f"lin{i}.randlora_{name}" for i in (0, 2) for name in "AB")
    once = {key: array for key, array in tensors.items() if not key.endswith(layers)}
    assert len(once) == 6
    save_file(once, tmp_path / "adapter_model.safetensors")
    variables, config = rl_peft.load_adapter(tmp_path, {"params": params})
    assert_close(RandLora(MLP(), config).apply(variables, x.numpy()), model(x))
    # Why the bases are written beside every layer: PEFT's loader misses them.
    with pytest.warns(UserWarning, match="missing adapter keys"):
        peft.PeftModel.from_pretrained(TorchMLP(), tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_training_goes_on_across(mode, tmp_path):
    torch.manual_seed(9)
    base, x, probe = TorchMLP(), torch.randn(6, 10), torch.randn(6, 8)
    params, rate = params_of(base), 0.05
    model = adapted(base, target_modules=["lin0", "lin1", "lin2"], bias="all", **MODES[mode])
    model.save_pretrained(tmp_path / "before")
    variables, config = rl_peft.load_adapter(tmp_path / "before", {"params": params})

    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((model(x) * probe).sum(), list(named.values()))
    with torch.no_grad():
        for parameter, gradient in zip(named.values(), gradients, strict=True):
            parameter.sub_(rate * gradient)
    model.save_pretrained(tmp_path / "after")
    stepped, _ = rl_peft.load_adapter(tmp_path / "after", {"params": params})
    stepped, _ = rl.split(stepped, config)

    trainable, frozen = rl.split(variables, config)
    adapted_model = RandLora(MLP(), config)

    def loss(trainable):
        y = adapted_model.apply(rl.combine(trainable, frozen), x.numpy())
        return (y * probe.numpy()).sum()

    with jax.default_matmul_precision("highest"):
        ours = jax.grad(loss)(trainable)
    updates, _ = optax.sgd(rate).update(ours, optax.sgd(rate).init(trainable))
    ours_stepped = optax.apply_updates(trainable, updates)
    by_name = dict(zip(named, gradients, strict=True))
    for i in range(3):
        prefix = f"base_model.model.lin{i}."
        scales = ours["randlora"][f"lin{i}"]
        assert_close(scales["randlora_lambda"], by_name[prefix + "randlora_lambda.default"])
        assert_close(scales["randlora_gamma"], by_name[prefix + "randlora_gamma.default"])
        assert_close(ours["params"][f"lin{i}"]["bias"], by_name[prefix + "base_layer.bias"])
    close = lambda a, b: bool(jnp.abs(a - b).max() <= 1e-5 * jnp.abs(b).max())
    assert jax.tree.all(jax.tree.map(close, ours_stepped, stepped))


def test_a_bfloat16_base_gives_its_bases_too(tmp_path):
    torch.manual_seed(10)
    base = TorchMLP().to(torch.bfloat16)
    narrow = lambda a: a.astype(jnp.bfloat16)
    params = jax.tree.map(narrow, params_of(TorchMLP().to(torch.bfloat16).float()))
    model = adapted(base, target_modules=["lin0", "lin1"], sparse=True, modules_to_save=["lin2"])
    model.save_pretrained(tmp_path / "theirs")
    variables, config = rl_peft.load_adapter(tmp_path / "theirs", {"params": params})
    assert variables["params"]["lin2"]["kernel"].dtype == jnp.bfloat16
    rl_peft.save_adapter(tmp_path / "ours", variables, config)
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
