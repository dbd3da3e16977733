"""MaxText's decoders as it builds them, unmodified and not registered."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from maxtext.models import models

import randlora_jax as rl
from randlora_jax.nnx import RandLoraParam, inject, load_adapter, merge, update, variables
from tests.linen_cases import randomised
from tests.peers.test_maxtext import CONFIG, config, mesh

ROWS, LENGTH, VOCABULARY = 2, 8, 32
TOKENS = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, VOCABULARY)
POSITIONS = jnp.tile(jnp.arange(LENGTH), (ROWS, 1))
SIZES = dict(
    base_emb_dim=16, base_mlp_dim=24, base_moe_mlp_dim=24, base_num_decoder_layers=3,
    base_num_query_heads=4, base_num_kv_heads=2, head_dim=8, vocab_size=VOCABULARY,
    max_target_length=LENGTH, max_prefill_predict_length=4, attention="dot_product",
    remat_policy="none", num_experts=1, num_experts_per_tok=1,
)  # fmt: skip
MLA = dict(
    decoder_block="deepseek", attention_type="mla", q_lora_rank=8, kv_lora_rank=8, head_dim=12,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, base_num_kv_heads=4, num_experts=4,
    num_experts_per_tok=2, shared_experts=1, first_num_dense_layers=1, base_num_decoder_layers=2,
    scan_layers=False, mla_naive_kvcache=False,
)  # fmt: skip
MIXTRAL = dict(decoder_block="mixtral", num_experts=4, num_experts_per_tok=2)
MODELS = {
    "llama, scanned": dict(decoder_block="llama2"),
    "llama, unrolled": dict(decoder_block="llama2", scan_layers=False),
    # As in Llama 3 8B, which has 32 of both: an axis of the stack is as long as one of a layer.
    "llama, as many heads as layers": dict(decoder_block="llama2", base_num_decoder_layers=4),
    "mixtral, scanned": MIXTRAL,
    "mixtral, scanned along the first axis": {**MIXTRAL, "param_scan_axis": 0},
    "deepseek": MLA,
}


@pytest.fixture(autouse=True)
def _quiet():
    # MaxText uses of Flax what is deprecated, and the embedding is named in a warning.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def made(**changes):
    settings = config(**SIZES | changes)
    rngs = nnx.Rngs(params=0, dropout=1)
    return models.Transformer(settings, mesh(settings), None, rngs=rngs)


def call(model):
    segments = jnp.ones_like(TOKENS)
    return model(TOKENS, POSITIONS, decoder_segment_ids=segments, enable_dropout=False)


def logits(model):
    return np.asarray(nnx.jit(call)(model))


def randomise(model):
    values = variables(model)
    update(model, {**values, "randlora": randomised(values["randlora"])})


def kernels(model):
    """The paths of the kernels that a model has, with those of experts, and without labels."""
    paths = ("/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    ends = ("kernel", "wi_0", "wi_1", "wo")
    found = (p.removesuffix("/kernel") for p in paths if p.rpartition("/")[2] in ends)
    return set(found)


@pytest.mark.parametrize("name", MODELS)
def test_a_decoder_is_adapted_trains_and_merges(name, tmp_path):
    base = made(**MODELS[name])
    expected, frozen = kernels(base), logits(base)
    model = inject(made(**MODELS[name]), CONFIG)
    added = variables(model)["randlora"]
    assert {"/".join(p[:-1]).partition("[")[0] for p, _ in rl.trees.items(added)} == expected
    # Not under jit: XLA fuses the base's own products in another order there.
    np.testing.assert_array_equal(call(model), call(base))

    randomise(model)
    loss = lambda model: jnp.mean((call(model) - 1.0) ** 2)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=RandLoraParam)

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, RandLoraParam))(model)
        optimizer.update(model, gradients)
        return value, gradients

    losses = [float(step(model, optimizer)[0]) for _ in range(3)]
    assert losses[-1] < losses[0]
    for path, gradient in nnx.to_flat_state(step(model, optimizer)[1]):
        value = np.asarray(gradient.get_value())
        assert np.isfinite(value).all() and np.abs(value).max() > 0, path

    y = logits(model)
    assert np.abs(y - frozen).max() > 1e-2 * np.abs(y).max()
    rl.save_adapter(tmp_path / "adapter", variables(model), CONFIG)
    other = made(**MODELS[name])
    load_adapter(tmp_path / "adapter", other)
    np.testing.assert_array_equal(logits(other), y)
    merge(model)
    np.testing.assert_allclose(logits(model), y, atol=1e-4 * np.abs(y).max())
