"""gemma's Linen models, unmodified and not registered: Gemma 3, 3n and 4, with experts too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gemma import gm
from gemma.gm.nn.gemma3n import _gemma3n
from gemma.gm.nn.gemma3n import _layers as layers_3n
from gemma.gm.nn.gemma4 import _config, _gemma4, _moe
from gemma.gm.nn.gemma4 import _layers as layers_4

import randlora_jax as rl
from randlora_jax import trees
from randlora_jax.linen import RandLora
from tests.linen_cases import randomised

CONFIG = rl.RandLoraConfig(r=4, randlora_alpha=4.0, target_modules="all-linear")
SIZES = dict(num_embed=32, embed_dim=16, hidden_dim=24, num_heads=4, head_dim=8, num_kv_heads=2)
TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 4, 32)


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
# Inputs of its own for every layer, and the last two take the keys and values of those before.
LOCAL, GLOBAL = (_gemma4.Gemma4_E2B.config.attention_types[i] for i in (0, -1))
E2B = dict(
    attention_types=(LOCAL, GLOBAL) * 2, per_layer_input_dim=8, override_kv_shared_ffw_hidden=40,
    num_global_kv_heads=None, global_key_size=8,
    kv_cache_sharing_config=_config.KVCacheSharingConfig(0.5, share_global=True, share_local=True),
)  # fmt: skip
PER_LAYER = {"per_layer_input_gate/w[0]", "per_layer_projection/w[0]"}
IN_3N = {"altup/modality_router/w[0]", "laurel/linear_left/w[0]", "laurel/linear_right/w[0]"}
ONE_KEY = ATTENTION - {"attn/kv_einsum/w[2]"} | {"attn/k_einsum/w[1]"}
WIDE = dict(num_global_kv_heads=1, global_key_size=16, k_eq_v_global=True)
# How each is made, the kernels of one of its layers, and which that is.
MODELS = {
    "gemma 3": (lambda: small(gm.nn.Gemma3_1B), ATTENTION | DENSE, 0),
    "gemma 3n": (
        lambda: small(_gemma3n.Gemma3n_E2B),
        ATTENTION | DENSE | IN_3N | {f"per_layer_mapping/{name}" for name in PER_LAYER},
        0,
    ),
    "gemma 4": (lambda: small(_gemma4.Gemma4_31B, **PLAIN_4), ATTENTION | DENSE, 0),
    "gemma 4, one key for both": (
        lambda: small(_gemma4.Gemma4_31B, **WIDE), ONE_KEY | DENSE, 1
    ),
    "gemma 4, inputs of each layer": (
        lambda: small(_gemma4.Gemma4_E2B, **E2B), ATTENTION | DENSE | PER_LAYER, 0
    ),
    "gemma 4, experts": (
        lambda: small(_gemma4.Gemma4_26B_A4B, **PLAIN_4, **EXPERTS),
        ATTENTION | MOE,
        0,
    ),
}  # fmt: skip
UNUSED = {f"layer_{i}/attn/kv_einsum/w[2]" for i in (2, 3)}  # of the model that has four
ALONE = {"einsum": _moe.MoE, "ragged_dot": _moe.MoERagged}


@pytest.fixture(scope="module", params=MODELS)
def family(request):
    make, names, layer = MODELS[request.param]
    base = make()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = jax.jit(base.init)(jax.random.key(0), TOKENS)["params"]
    # As they start, norms of Gemma 3n are zeros, and so is all that comes out.
    rng = np.random.default_rng(5)
    noisy = lambda _, a: 2 * a + jnp.asarray(rng.normal(0, 0.3, a.shape), a.dtype)
    return base, trees.map_with_path(noisy, params), names, layer


def logits(apply, variables):
    return jax.jit(lambda v: apply(v, TOKENS).logits)(variables)


def trained(base, params, **changes):
    config = CONFIG.replace(**changes)
    model = RandLora(base, config)
    variables = model.adapt({"params": params}, TOKENS)
    return model, {**variables, "randlora": randomised(variables["randlora"])}


def test_all_linear_layers_are_adapted_from_the_base_s_bits_on(family):
    base, params, names, layer = family
    model = RandLora(base, CONFIG)
    variables = model.adapt({"params": params}, TOKENS)
    of_layer = variables["randlora"][f"layer_{layer}"]
    assert {"/".join(path[:-1]) for path, _ in trees.items(of_layer)} == names
    text = rl.summary(variables, CONFIG)
    assert all(name.partition("[")[0].split("/")[1] in text for name in names)
    y = logits(base.apply, {"params": params})
    assert np.abs(y).max() > 0.1
    np.testing.assert_array_equal(logits(model.apply, variables), y)


def test_every_scale_trains_and_merging_gives_the_same(family, tmp_path):
    base, params, *_ = family
    model, variables = trained(base, params)
    trainable, frozen = rl.split(variables, CONFIG)
    loss = lambda t: jnp.sum(model.apply(rl.combine(t, frozen), TOKENS).logits ** 2)
    for path, gradient in trees.items(jax.jit(jax.grad(loss))(trainable)["randlora"]):
        unused = "/".join(path[:-1]) in UNUSED
        assert np.isfinite(gradient).all() and (np.abs(gradient).max() > 0) != unused, path
    y = logits(model.apply, variables)
    assert np.abs(y - logits(base.apply, {"params": params})).max() > 1e-2 * np.abs(y).max()
    merged = logits(base.apply, {"params": model.merge(variables)})
    np.testing.assert_allclose(merged, y, atol=1e-4 * np.abs(y).max())
    rl.save_adapter(tmp_path / "adapter", variables, CONFIG)
    loaded, config = rl.load_adapter(tmp_path / "adapter", {"params": params})
    np.testing.assert_array_equal(logits(RandLora(base, config).apply, loaded), y)


def test_a_step_with_the_model_s_own_cache_gives_the_same(family):
    base, params, *_ = family
    model, variables = trained(base, params)
    cache = base.init_cache(batch_size=2, dtype=jnp.float32, cache_length=8)

    def next_token(apply, variables):
        mask = jnp.tril(jnp.ones((6, 8), bool)) * jnp.ones((2, 1, 1), bool)
        positions = jnp.tile(jnp.arange(6), (2, 1))
        first = {"positions": positions[:, :5], "attention_mask": mask[:, :5]}
        cached = apply(variables, TOKENS[:, :5], cache=cache, **first).cache
        one = {"positions": positions[:, 5:], "attention_mask": mask[:, 5:]}
        return apply(variables, TOKENS[:, 5:], cache=cached, **one).logits[:, 0]

    y = jax.jit(lambda v: next_token(model.apply, v))(variables)
    size = np.abs(y).max()
    np.testing.assert_allclose(y, logits(model.apply, variables)[:, 5], atol=1e-4 * size)
    merged = {"params": model.merge(variables)}
    by_merged = jax.jit(lambda v: next_token(base.apply, v))(merged)
    np.testing.assert_allclose(by_merged, y, atol=1e-4 * size)


def test_dropout_in_a_scope_that_layers_share_is_refused(family):
    base, params, *_ = family
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


LAYERS = {
    "3n, scaled": layers_3n.Einsum((16, 12), w_scale=0.25),
    "3n": layers_3n.Einsum((16, 12)),
    "4, scaled": layers_4.Einsum((16, 12), w_scale=0.25),
    "4, clipped": layers_4.ClippedEinsum((16, 12), w_scale=0.25),
}


@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_changes_its_kernel_computes_the_same_for_few_tokens_as_for_many(name, tokens):
    base = LAYERS[name]
    args = "td,dn->tn", jax.random.normal(jax.random.key(2), (tokens, 16))
    params = base.init(jax.random.key(0), *args)["params"]
    if "clip_input_max" in params:
        bounds = {f"clip_{a}_{b}": jnp.float32(c) for a in ("input", "output")
                  for b, c in (("min", -0.8), ("max", 0.5))}  # fmt: skip
        params = {**params, **bounds}
    model = RandLora(base, CONFIG)
    variables = model.adapt({"params": params}, *args)
    variables = {**variables, "randlora": randomised(variables["randlora"])}
    y = model.apply(variables, *args)
    merged = base.apply({"params": model.merge(variables)}, *args)
    np.testing.assert_allclose(merged, y, atol=1e-4 * np.abs(y).max())
