"""Other adapters and files of PEFT's, loaded: Conv1D, direct injection, one pair of bases."""

import peft
import torch
from safetensors.numpy import load_file, save_file
from transformers.pytorch_utils import Conv1D

from randlora_jax import peft as rl_peft
from randlora_jax.linen import RandLora
from tests.parity.peft_models import MLP, TorchMLP, adapted, assert_close, params_of


def conv1d(in_features, out_features):
    return Conv1D(out_features, in_features)


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


def test_the_biases_of_adapted_layers_by_lora_s_name(tmp_path):
    torch.manual_seed(3)
    base, x = TorchMLP(), torch.randn(6, 10)
    params = params_of(base)
    model = adapted(base, target_modules=["lin0", "lin2"], bias="lora_only")
    model.save_pretrained(tmp_path)
    variables, config = rl_peft.load_adapter(tmp_path, {"params": params})
    assert config.bias == "randlora_only"
    assert (variables["params"]["lin0"]["bias"] != params["lin0"]["bias"]).all()
    assert_close(RandLora(MLP(), config).apply(variables, x.numpy()), model(x))


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
