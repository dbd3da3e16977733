"""A step of training gives here what it gives in PEFT."""

import jax
import jax.numpy as jnp
import optax
import pytest
import torch

import randlora_jax as rl
from randlora_jax import peft as rl_peft
from randlora_jax.linen import RandLora
from tests.parity.peft_models import MLP, MODES, TorchMLP, adapted, assert_close, params_of


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
