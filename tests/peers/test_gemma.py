"""gemma's Linen models, unmodified and not registered: Gemma 3, 3n and 4, with experts too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gemma import gm
from gemma.gm.nn.gemma3n import _gemma3n
from gemma.gm.nn.gemma4 import _gemma4, _moe

import randlora_jax as rl
from randlora_jax import trees
from randlora_jax.linen import RandLora
from tests.linen_cases import randomised

CONFIG = rl.RandLoraConfig(r=4, randlora_alpha=4.0, target_modules="all-linear")
SIZES = dict(num_embed=32, embed_dim=16, hidden_dim=24, num_heads=4, head_dim=8, num_kv_heads=2)
TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 4, 32)


@pytest.fixture(autouse=True)
def _promotion():
    # The models multiply arrays of different dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def small(cls, **changes):
    """A model of the class, as small as can be, without an encoder of images or sound."""
    config = cls.config if hasattr(cls, "config") else cls.__dataclass_fields__["config"].default
    names = {field.name for field in dataclasses.fields(config)}
    wanted = {
        **SIZES, "attention_types": config.attention_types[-2:], "sliding_window_size": 4,
        "vision_encoder": None, "audio_encoder": None, **changes,
    }  # fmt: skip
    config = dataclasses.replace(config, **{k: wanted[k] for k in wanted if k in names})
    return cls(config=config, dtype=jnp.float32)


# The kernels of a layer, with their input axes.
ATTENTION = {"attn/q_einsum/w[1]", "attn/kv_einsum/w[2]", "attn/attn_vec_einsum/w[0,1]"}
DENSE = {"mlp/gating_einsum[2]", "mlp/linear[0]"}
MOE = {
    "mlp/gating_einsum/w[0;3]", "mlp/linear/w[0;1]", "mlp/router_logits/w[0]",
    "mlp2/gating_einsum[2]", "mlp2/linear[0]",
}  # fmt: skip
EXPERTS = dict(
    enable_moe=True, num_experts=4, expert_dim=12, top_k_experts=2, moe_dense_hidden_dim=24
)
PLAIN_4 = dict(
    num_global_kv_heads=None, global_key_size=None, k_eq_v_global=False, per_layer_input_dim=0,
    kv_cache_sharing_config=None, override_kv_shared_ffw_hidden=None,
)  # fmt: skip
MODELS = {
    "gemma 3": (lambda: small(gm.nn.Gemma3_1B), ATTENTION | DENSE),
    "gemma 4": (lambda: small(_gemma4.Gemma4_31B, **PLAIN_4), ATTENTION | DENSE),
    "gemma 4, experts": (
        lambda: small(_gemma4.Gemma4_26B_A4B, **PLAIN_4, **EXPERTS),
        ATTENTION | MOE,
    ),
}
ALONE = {"einsum": _moe.MoE, "ragged_dot": _moe.MoERagged}


@pytest.fixture(params=MODELS)
def family(request):
    make, names = MODELS[request.param]
    base = make()
    params = jax.jit(base.init)(jax.random.key(0), TOKENS)["params"]
    louder = lambda path, a: a * 4 if a.ndim > 1 and path[0] != "embedder" else a
    params = trees.map_with_path(louder, params)
    return base, params, names


def logits(apply, variables):
    return jax.jit(lambda v: apply(v, TOKENS).logits)(variables)


def trained(base, params, **changes):
    config = CONFIG.replace(**changes)
    model = RandLora(base, config)
    variables = model.adapt({"params": params}, TOKENS)
    return model, {**variables, "randlora": randomised(variables["randlora"])}


def test_all_linear_layers_are_adapted_from_the_base_s_bits_on(family):
    base, params, names = family
    model = RandLora(base, CONFIG)
    variables = model.adapt({"params": params}, TOKENS)
    found = {"/".join(path[:-1]) for path, _ in trees.items(variables["randlora"]["layer_0"])}
    assert found == names
    y = logits(base.apply, {"params": params})
    np.testing.assert_array_equal(logits(model.apply, variables), y)


def test_every_scale_trains_and_merging_gives_the_same(family, tmp_path):
    base, params, _ = family
    model, variables = trained(base, params)
    trainable, frozen = rl.split(variables, CONFIG)
    loss = lambda t: jnp.sum(model.apply(rl.combine(t, frozen), TOKENS).logits ** 2)
    for path, gradient in trees.items(jax.jit(jax.grad(loss))(trainable)["randlora"]):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, path
    y = logits(model.apply, variables)
    assert np.abs(y - logits(base.apply, {"params": params})).max() > 1e-2 * np.abs(y).max()
    merged = logits(base.apply, {"params": model.merge(variables)})
    np.testing.assert_allclose(merged, y, atol=1e-4 * np.abs(y).max())
    rl.save_adapter(tmp_path / "adapter", variables, CONFIG)
    loaded, config = rl.load_adapter(tmp_path / "adapter", {"params": params})
    np.testing.assert_array_equal(logits(RandLora(base, config).apply, loaded), y)
    assert "gating_einsum" in rl.summary(variables, CONFIG)


def test_dropout_in_a_scope_that_layers_share_is_refused(family):
    base, params, _ = family
    model, variables = trained(base, params, randlora_dropout=0.5)
    rngs = {"dropout": jax.random.key(0)}
    with pytest.raises(ValueError, match=r"randlora_dropout=0.5 has no input to act on.*mlp"):
        model.apply(variables, TOKENS, rngs=rngs, deterministic=False)
    model, variables = trained(base, params, randlora_dropout=0.5, exclude_modules=r".*mlp.*")
    y = model.apply(variables, TOKENS, rngs=rngs, deterministic=False).logits
    assert bool(jnp.isfinite(y).all())


@pytest.mark.parametrize("way", ALONE)
def test_experts_by_themselves(way):
    base = ALONE[way](features=16, hidden_dim=12, num_experts=4, num_experts_per_datapoint=2)
    x = jax.random.normal(jax.random.key(2), (2, 5, 16))
    params = jax.jit(base.init)(jax.random.key(0), x)["params"]
    model = RandLora(base, CONFIG)
    variables = model.adapt({"params": params}, x)
    assert set(variables["randlora"]) == {"gating_einsum", "linear", "router_logits"}
    shape = variables["randlora"]["linear"]["w[0;1]"]["randlora_lambda"].shape
    assert shape == (4, 4, 3)
    apply = lambda apply, variables: jax.jit(apply)(variables, x)
    base_y = apply(base.apply, {"params": params})
    np.testing.assert_array_equal(apply(model.apply, variables), base_y)
    variables = {**variables, "randlora": randomised(variables["randlora"])}
    y = apply(model.apply, variables)
    assert np.abs(y - base_y).max() > 1e-2 * np.abs(y).max()
    merged = apply(base.apply, {"params": model.merge(variables)})
    np.testing.assert_allclose(merged, y, atol=1e-4 * np.abs(y).max())


def test_gemma_3n_is_adapted_too():
    base = small(_gemma3n.Gemma3n_E2B)
    params = jax.jit(base.init)(jax.random.key(0), TOKENS)["params"]
    model, variables = trained(base, params)
    y = logits(model.apply, variables)
    merged = logits(base.apply, {"params": model.merge(variables)})
    np.testing.assert_allclose(merged, y, atol=1e-4 * np.abs(y).max())
