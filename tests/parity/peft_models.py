"""A small model in torch and Flax, adapted by PEFT, and what compares the two sides."""

import json
import re
import warnings

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import peft
import torch
from safetensors.numpy import load_file
from transformers.pytorch_utils import Conv1D

NO_COPIES = "Found missing adapter keys while loading the checkpoint"
MODES = {"dense": {}, "sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}


class TorchMLP(torch.nn.Module):
    """in < out, in = out, in > out."""

    def __init__(self, linear=torch.nn.Linear):
        super().__init__()
        self.lin0, self.lin1, self.lin2 = linear(10, 20), linear(20, 20), linear(20, 8)

    def forward(self, x):
        return self.lin2(torch.relu(self.lin1(torch.relu(self.lin0(x)))))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(20, name="lin0")(x))
        return nn.Dense(8, name="lin2")(nn.relu(nn.Dense(20, name="lin1")(x)))


def params_of(model):
    """A torch MLP's parameters for the Flax one."""
    state = {name: jnp.asarray(value.numpy()) for name, value in model.state_dict().items()}
    kernel = lambda name: state[name] if isinstance(model.lin0, Conv1D) else state[name].T
    return {
        f"lin{i}": {"kernel": kernel(f"lin{i}.weight"), "bias": state[f"lin{i}.bias"]}
        for i in range(3)
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


def load_in_peft(base, folder, says=(), **options):
    """What PEFT makes of an adapter, with the warnings told and no other."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, folder, **options)
    texts = [str(warning.message) for warning in told if warning.category is UserWarning]
    assert len(texts) == len(says), texts
    assert all(text.startswith(start) for text, start in zip(texts, says, strict=True)), texts
    missing = [key for text in texts for key in re.findall(r"'(.+?)'", text)]
    assert all(re.search(r"\.randlora_[AB]\.\w+$", key) for key in missing), texts
    return model


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
