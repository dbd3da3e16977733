"""Adapters that move between PEFT and this library: no bit and no output changes."""

import jax
import jax.numpy as jnp
import peft
import pytest
import torch

import randlora_jax as rl
from randlora_jax import peft as rl_peft
from randlora_jax.linen import RandLora
from tests.parity.peft_models import (
    MLP,
    NO_COPIES,
    TorchMLP,
    adapted,
    assert_close,
    assert_same_files,
    load_in_peft,
    params_of,
)

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

    rl_peft.save_adapter(tmp_path / "ours", variables, config, layout="copies")
    hidden = {f"base_model.model.lin2.{n}.bias" for n in ("modules_to_save", "original_module")}
    assert_same_files(tmp_path / "theirs", tmp_path / "ours", hidden)
    rl_peft.save_adapter(tmp_path / "small", variables, config)
    for folder, says in (("ours", ()), ("small", (NO_COPIES,))):
        base = TorchMLP()
        base.load_state_dict(state)
        assert torch.equal(load_in_peft(base, tmp_path / folder, says)(x), model(x))


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
    theirs = load_in_peft(base, tmp_path, (NO_COPIES,))
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
        rl_peft.save_adapter(
            tmp_path / "ours", variables, config, adapter_name=name, layout="copies"
        )
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    # PEFT adds bases to a layer that this adapter does not adapt, since the other one does.
    idle = {f"base_model.model.lin0.randlora_{name}" for name in "AB"}
    assert_same_files(tmp_path / "theirs" / "other", tmp_path / "ours" / "other", idle)


def test_a_bfloat16_base_gives_its_bases_too(tmp_path):
    torch.manual_seed(10)
    base = TorchMLP().to(torch.bfloat16)
    narrow = lambda a: a.astype(jnp.bfloat16)
    params = jax.tree.map(narrow, params_of(TorchMLP().to(torch.bfloat16).float()))
    model = adapted(base, target_modules=["lin0", "lin1"], sparse=True, modules_to_save=["lin2"])
    model.save_pretrained(tmp_path / "theirs")
    variables, config = rl_peft.load_adapter(tmp_path / "theirs", {"params": params})
    assert variables["params"]["lin2"]["kernel"].dtype == jnp.bfloat16
    rl_peft.save_adapter(tmp_path / "ours", variables, config, layout="copies")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
