"""tunix's Llama3, unmodified, with random weights: all seven projections adapted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.sft import utils as sft

import randlora_jax as rl
from randlora_jax.nnx import RandLoraParam, inject, load_adapter, merge, variables

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = rl.RandLoraConfig(r=4, randlora_alpha=8.0, target_modules=SEVEN)
LLAMA = llama3.ModelConfig(
    num_layers=2, vocab_size=32, embed_dim=16, hidden_dim=24, num_heads=4, head_dim=4,
    num_kv_heads=2, rope_theta=10_000, norm_eps=1e-5,
)  # fmt: skip


def make(remat=llama3.RematConfig.NONE):
    model = llama3.Llama3(dataclasses.replace(LLAMA, remat_config=remat), rngs=nnx.Rngs(0))
    model.lm_head.w[...] *= 50.0  # it starts so small that no logit could tell anything
    return model


TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 32)


def logits(model, tokens=TOKENS):
    length = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (2, length, length))
    return model(tokens, positions, None, mask)[0]


def loss(model, tokens):
    predicted = logits(model, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(predicted, tokens[:, 1:]).mean()


@nnx.jit
def step(model, optimizer, tokens):
    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, RandLoraParam))(model, tokens)
    optimizer.update(model, grads)
    return value


@pytest.mark.parametrize("remat", list(llama3.RematConfig))
def test_all_seven_projections_train_and_merge(remat):
    model, base = make(remat), make(remat)
    inject(model, CONFIG)
    adapted = {path[:3] for path, _ in rl.trees.items(variables(model)["randlora"])}
    assert len(adapted) == 2 * 2  # attention and MLP of two layers
    names = {path[3] for path, _ in rl.trees.items(variables(model)["randlora"])}
    assert names == set(SEVEN)
    assert sft.is_lora_enabled(model)
    np.testing.assert_array_equal(logits(model), logits(base))

    frozen = jax.tree.map(np.asarray, variables(model)["params"])
    optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=RandLoraParam)
    losses = [float(step(model, optimizer, TOKENS)) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, variables(model)["params"], frozen)

    y = logits(model)
    assert np.abs(y - logits(base)).max() > 0.1
    merge(model)
    np.testing.assert_allclose(logits(model), y, atol=1e-4)
    assert type(model) is llama3.Llama3
    assert nnx.graphdef(model) == nnx.graphdef(base)


def test_an_adapter_is_saved_and_loaded(tmp_path):
    model = inject(make(), CONFIG.replace(init_weights=False))
    rl.save_adapter(tmp_path / "adapter", variables(model), CONFIG.replace(init_weights=False))
    other = make()
    load_adapter(tmp_path / "adapter", other)
    np.testing.assert_array_equal(logits(other), logits(model))
