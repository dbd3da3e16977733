"""tunix's models, unmodified and not registered: what is adapted, and what it then computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tunix.models.gemma import model as gemma
from tunix.models.gemma3 import model as gemma3
from tunix.models.gemma4 import model as gemma4
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3

import randlora_jax as rl
from randlora_jax.nnx import (
    RandLoraParam,
    inject,
    load_adapter,
    merge,
    quantize,
    update,
    variables,
)
from tests.linen_cases import randomised
from tests.quantised_models import to_floats

CONFIG = rl.RandLoraConfig(r=4, randlora_alpha=4.0, target_modules="all-linear")
SIZES = dict(num_layers=2, embed_dim=16, hidden_dim=24, num_heads=4, head_dim=4, num_kv_heads=2)
LLAMA = dict(**SIZES, vocab_size=32, rope_theta=10_000, norm_eps=1e-5)
GEMMA = dict(**SIZES, num_embed=32)
F32 = jnp.float32
LOCAL = gemma3.AttentionType.LOCAL_SLIDING
SHARED = gemma4.AttentionType


def of_gemma4(**options):
    pattern = (SHARED.LOCAL_SLIDING, SHARED.GLOBAL)
    return gemma4.Gemma4(
        gemma4.ModelConfig(
            **GEMMA, attention_pattern=pattern, sliding_window_size=8, global_key_size=8,
            use_sliding_window_kv_cache=False, **options,
        ),
        rngs=nnx.Rngs(0),
    )  # fmt: skip


SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
EXPERTS = {"gate_proj[0;1]", "up_proj[0;1]", "down_proj[0;1]"}
# name: (how the model is made, what the kernels in its first layer are called)
MODELS = {
    "llama3": (lambda: llama3.Llama3(llama3.ModelConfig(**LLAMA), rngs=nnx.Rngs(0)), SEVEN),
    "qwen2": (lambda: qwen2.Qwen2(qwen2.ModelConfig(**LLAMA), rngs=nnx.Rngs(0)), SEVEN),
    "qwen3": (lambda: qwen3.Qwen3(qwen3.ModelConfig(**LLAMA), rngs=nnx.Rngs(0)), SEVEN),
    "qwen3, experts": (
        lambda: qwen3.Qwen3(
            qwen3.ModelConfig(**LLAMA, num_experts=4, num_experts_per_tok=2), rngs=nnx.Rngs(0)
        ),
        {"q_proj", "k_proj", "v_proj", "o_proj", "router"} | EXPERTS,
    ),
    "gemma": (
        lambda: gemma.Gemma(
            gemma.ModelConfig(
                **GEMMA, final_logit_softcap=None, use_post_attn_norm=False,
                use_post_ffw_norm=False, attention_types=[gemma.AttentionType.GLOBAL] * 2,
            ),
            rngs=nnx.Rngs(0),
        ),
        {"q_einsum", "kv_einsum", "attn_vec_einsum", "gate_proj", "up_proj", "down_proj"},
    ),
    "gemma3": (
        lambda: gemma3.Gemma3(
            gemma3.ModelConfig(**GEMMA, sliding_window_size=8, param_dtype=F32), rngs=nnx.Rngs(0)
        ),
        {"q_einsum", "kv_einsum", "attn_vec_einsum", "gate_proj", "up_proj", "down_proj"},
    ),
    "gemma4": (
        of_gemma4,
        {"q_einsum", "kv_einsum", "attn_vec_einsum", "gate_proj", "up_proj", "down_proj"},
    ),
    "gemma4, experts": (
        lambda: of_gemma4(
            enable_moe=True, num_experts=4, num_experts_per_tok=2, expert_dim=12,
            moe_dense_hidden_dim=24,
        ),
        {"q_einsum", "kv_einsum", "attn_vec_einsum", "gate_proj", "up_proj", "down_proj",
         "gating_einsum[0;3]", "linear[0;1]"},
    ),
}  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(1), (2, 7), 0, 32)


@pytest.fixture(params=MODELS)
def family(request):
    make, names = MODELS[request.param]

    def louder():
        # They start so small that no logit could tell anything.
        model = make()
        for path, variable in nnx.iter_graph(model):
            if isinstance(variable, nnx.Param) and path[-1] in ("w", "gating_einsum", "linear"):
                variable.set_value(variable.get_value() * 5)
        return model

    return louder, names


@nnx.jit
def logits(model):
    length = TOKENS.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), TOKENS.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (2, length, length))
    return model(TOKENS, positions, None, mask)[0]


def trained(model):
    inject(model, CONFIG)
    values = variables(model)
    update(model, {**values, "randlora": randomised(values["randlora"])})
    return model


def test_all_linear_layers_are_adapted_from_the_base_s_bits_on(family):
    make, names = family
    base, model = make(), make()
    inject(model, CONFIG)
    found = [path for path, _ in rl.trees.items(variables(model)["randlora"]["layers"]["0"])]
    # A kernel w of an Einsum has its label below the name of the layer.
    assert {path[-3] if path[-2].startswith("w[") else path[-2] for path in found} == names
    np.testing.assert_array_equal(logits(model), logits(base))


def test_every_scale_trains_and_merging_gives_the_same(family):
    make, _ = family
    base, model = make(), trained(make())
    loss = lambda model: jnp.sum(logits(model) ** 2)
    gradients = nnx.grad(loss, argnums=nnx.DiffState(0, RandLoraParam))(model)
    for path, gradient in nnx.to_flat_state(gradients):
        value = np.asarray(gradient.get_value())
        assert np.isfinite(value).all() and np.abs(value).max() > 0, path
    y = np.asarray(logits(model))
    assert np.abs(y - logits(base)).max() > 1e-2 * np.abs(y).max()
    merge(model)
    np.testing.assert_allclose(logits(model), y, atol=1e-4 * np.abs(y).max())
    assert type(model) is type(base)
    assert nnx.graphdef(model) == nnx.graphdef(base)


def test_an_adapter_is_saved_and_loaded(family, tmp_path):
    make, _ = family
    model = trained(make())
    rl.save_adapter(tmp_path / "adapter", variables(model), CONFIG)
    other = make()
    load_adapter(tmp_path / "adapter", other)
    np.testing.assert_array_equal(logits(other), logits(model))


def test_a_quantised_base_computes_and_trains_as_its_floats(family):
    make, _ = family
    how = {"qtype": "nf4", "tile_size": 4}

    def loss(model):
        return jnp.sum(logits(model) ** 2) / 100

    def gradients(model):
        return nnx.to_pure_dict(nnx.grad(loss, argnums=nnx.DiffState(0, RandLoraParam))(model))

    model = quantize(make(), **how)
    start = logits(model)
    twin = to_floats(quantize(make(), **how))
    scale = float(jnp.abs(start).max())
    np.testing.assert_allclose(start, logits(twin), atol=1e-5 * scale)
    inject(model, CONFIG)
    np.testing.assert_allclose(logits(model), start, atol=1e-5 * scale)
    ours, theirs = (trained(m) for m in (quantize(make(), **how), twin))
    np.testing.assert_allclose(logits(ours), logits(theirs), atol=1e-4 * scale)
    pairs = zip(*(jax.tree.leaves(gradients(m)) for m in (ours, theirs)), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=5e-3 * jnp.abs(other).max())
    y = logits(ours)
    np.testing.assert_allclose(logits(merge(ours)), y, atol=1e-4 * jnp.abs(y).max())
