"""openpi's language model of two experts in the bridge, as pi0 holds it: with openpi's sources."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx.bridge.variables import nnx_attrs_to_linen_vars
from openpi.models import gemma

import randlora_jax as rl
from randlora_jax.linen import RandLora
from randlora_jax.nnx import RandLoraParam

CONFIG = rl.RandLoraConfig(
    r=4, randlora_alpha=8, target_modules="all-linear", exclude_modules=["embedder"]
)
SIZES = gemma.get_config("dummy")
EMBEDDED = [jax.random.normal(jax.random.key(i), (2, 3, SIZES.width)) for i in range(2)]
CALL = EMBEDDED, jnp.tile(jnp.arange(6), (2, 1)), jnp.ones((2, 6, 6), bool)


@pytest.fixture
def base(monkeypatch):
    monkeypatch.setattr(gemma, "PALIGEMMA_VOCAB_SIZE", 32)
    return gemma.Module(configs=[SIZES, SIZES], embed_dtype="float32")


def made(module):
    bridge = nnx.bridge.ToNNX(module)
    bridge.lazy_init(rngs=nnx.Rngs(0), method="init", use_adarms=[False, False])
    return bridge


def test_it_is_adapted_trains_and_merges(base):
    model, plain = made(RandLora(base, CONFIG)), made(base)
    scales = nnx.to_flat_state(nnx.state(model, RandLoraParam))
    assert len(scales) == 2 * 2 * 5  # two experts, five kernels each
    for got, expected in zip(model(*CALL)[0], plain(*CALL)[0], strict=True):
        np.testing.assert_array_equal(got, expected)

    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=RandLoraParam)
    loss = lambda model: sum(jnp.sum((y - 1) ** 2) for y in model(*CALL)[0])

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, RandLoraParam))(model)
        optimizer.update(model, gradients)
        return value, gradients

    losses = [float(step(model, optimizer)[0]) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    for path, gradient in nnx.to_flat_state(step(model, optimizer)[1]):
        assert jnp.any(gradient.get_value()), path

    own = {k: v for k, v in vars(model).items() if not k.startswith(("to_nnx__", "_pytree__"))}
    params = rl.merge(nnx_attrs_to_linen_vars(own), CONFIG)
    merged = base.apply({"params": params}, *CALL)[0]
    for got, expected in zip(model(*CALL)[0], merged, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
