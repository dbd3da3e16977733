"""Several adapters by name on one base and one pair of bases."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import randlora_jax as rl
from randlora_jax import RandLoraConfig, adapters
from randlora_jax.linen import RandLora
from tests.linen_cases import as_numpy, assert_close, assert_same_bits, normal, randomised
from tests.linen_models import Block, Scan

X = normal(0, 4, 5)
CONFIGS = {
    "chat": RandLoraConfig(r=3, randlora_alpha=2.0, target_modules="all-linear"),
    "code": RandLoraConfig(r=3, randlora_alpha=5.0, target_modules=["up"]),
    "math": RandLoraConfig(r=3, randlora_alpha=1.0, target_modules=["down"]),
}


def train(variables, seed=7):
    return {**variables, "randlora": randomised(variables["randlora"], seed)}


BASE = Scan(length=2)
MODEL = RandLora(BASE, CONFIGS)


@functools.cache
def base_params():
    return BASE.init(jax.random.key(0), X)["params"]


@functools.cache
def all_variables():
    return train(MODEL.adapt({"params": base_params()}, X))


def kernels(params):
    return {name: as_numpy(params["layers"]["inner"][name]["kernel"]) for name in ("up", "down")}


def alone(name):
    """One adapter's own variables and config, as if there were no other."""
    return adapters.select(all_variables(), CONFIGS, name)


def test_the_updates_of_all_adapters_are_summed():
    base = kernels(base_params())
    total = dict(base)
    for name in CONFIGS:
        variables, config = alone(name)
        merged = kernels(RandLora(BASE, config).merge(variables))
        total = {k: total[k] + merged[k] - base[k] for k in total}
    assert_close(kernels(MODEL.merge(all_variables())), total, 1e-5)
    params = MODEL.merge(all_variables())
    expected = as_numpy(BASE.apply({"params": params}, X))
    for strategy in ("merged", "factored"):
        y = MODEL.clone(strategy=strategy).apply(all_variables(), X)
        assert_close(as_numpy(y), expected, 2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_sum_of_all_updates_is_rounded_once(dtype):
    x, configs = X.astype(dtype), {name: CONFIGS["chat"] for name in "abc"}
    model = RandLora(nn.Dense(7, dtype=dtype, param_dtype=dtype), configs)
    variables = train(model.init(jax.random.key(0), x))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), variables["params"])
    expected = model.merge({**variables, "params": wide})["kernel"].astype(dtype)
    assert_same_bits(model.merge(variables)["kernel"], expected)


def test_layers_of_one_shape_share_what_merging_compiles(caplog):
    base = nn.Sequential([nn.Dense(5, use_bias=False) for _ in range(4)])
    model = RandLora(base, CONFIGS["chat"].replace(randlora_alpha=7.25))  # as in no other test
    variables = train(model.init(jax.random.key(0), X))
    with jax.log_compiles():
        once, again = model.merge(variables), model.merge(variables)
    compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]
    assert sum("merged" in message for message in compiled) == 1
    assert_same_bits(again, once)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_active_adapter_computes_as_if_it_were_alone(name):
    variables, config = alone(name)
    y = MODEL.clone(active=(name,)).apply(all_variables(), X)
    assert_same_bits(y, RandLora(BASE, config).apply(variables, X))


def test_adapters_differ():
    chat, code = (MODEL.clone(active=(n,)).apply(all_variables(), X) for n in ("chat", "code"))
    assert float(abs(chat - code).max()) > 0.01


def test_without_an_active_adapter_the_output_is_bit_identical_to_the_base():
    disabled = MODEL.clone(active=())
    assert_same_bits(disabled.apply(all_variables(), X), BASE.apply({"params": base_params()}, X))
    assert_same_bits(
        disabled.apply({"params": base_params()}, X), BASE.apply({"params": base_params()}, X)
    )


def test_some_adapters_merge_and_the_others_stay():
    params = MODEL.clone(active=("chat", "math")).merge(all_variables())
    rest = MODEL.clone(active=("code",))
    y = rest.apply({**all_variables(), "params": params}, X)
    assert_close(as_numpy(y), as_numpy(MODEL.apply(all_variables(), X)), 2e-5)


def test_merging_leaves_the_original_bits_to_go_back_to():
    before = jax.tree.map(lambda a: a.copy(), all_variables()["params"])
    merged = MODEL.merge(all_variables())
    assert_same_bits(all_variables()["params"], before)
    assert all(
        a is b
        for a, b in zip(
            jax.tree.leaves(merged["layers"]["inner"]["up"]["bias"]),
            jax.tree.leaves(all_variables()["params"]["layers"]["inner"]["up"]["bias"]),
            strict=True,
        )
    )


def test_an_adapter_that_is_left_out_of_both_is_gone():
    configs = {k: v for k, v in CONFIGS.items() if k != "chat"}
    scales = {k: v for k, v in all_variables()["randlora"].items() if k != "chat"}
    y = RandLora(BASE, configs).apply({**all_variables(), "randlora": scales}, X)
    assert_same_bits(y, MODEL.clone(active=("code", "math")).apply(all_variables(), X))


def test_an_inserted_adapter_computes_as_it_did_and_changes_no_other():
    first, config = alone("code")
    held = {**first, "randlora": {"code": first["randlora"]}}
    wide = RandLoraConfig(r=3, randlora_alpha=3.0, target_modules="all-linear")
    model = RandLora(BASE, wide)
    added = train(model.adapt({"params": base_params()}, X), seed=8)
    variables, configs = adapters.insert(held, {"code": config}, "wide", added, wide)
    both = RandLora(BASE, configs)
    assert_same_bits(both.clone(active=("wide",)).apply(variables, X), model.apply(added, X))
    y = both.clone(active=("code",)).apply(variables, X)
    assert_same_bits(y, RandLora(BASE, config).apply(first, X))
    assert variables["params"] is held["params"]


@pytest.mark.parametrize("larger_first", [True, False])
def test_the_larger_of_two_pairs_of_bases_serves_both(larger_first):
    class Sizes(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name="small")(nn.Dense(9, name="large")(Block(name="block")(x)))

    params = Sizes().init(jax.random.key(0), X)["params"]
    configs = {
        "small": RandLoraConfig(r=3, randlora_alpha=2.0, target_modules=["up"]),
        "large": RandLoraConfig(r=3, randlora_alpha=2.0, target_modules=["large", "small"]),
    }
    made = {
        name: train(RandLora(Sizes(), config).adapt({"params": params}, X))
        for name, config in configs.items()
    }
    first, second = ("large", "small") if larger_first else ("small", "large")
    held = {**made[first], "randlora": {first: made[first]["randlora"]}}
    variables, both = adapters.insert(
        held, {first: configs[first]}, second, made[second], configs[second]
    )
    assert variables["randlora_bases"]["randlora_B"].shape[0] == 9
    for name, config in configs.items():
        y = RandLora(Sizes(), both, active=(name,)).apply(variables, X)
        assert_same_bits(y, RandLora(Sizes(), config).apply(made[name], X))


def test_very_sparse_adapters_of_layers_of_other_sizes_are_refused_with_the_reason():
    class Sizes(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="small")(nn.Dense(9, name="large")(x))

    params = Sizes().init(jax.random.key(0), X)["params"]
    configs = {
        name: RandLoraConfig(r=3, very_sparse=True, target_modules=[name])
        for name in ("small", "large")
    }
    made = {
        name: RandLora(Sizes(), config).adapt({"params": params}, X)
        for name, config in configs.items()
    }
    held = {**made["small"], "randlora": {"small": made["small"]["randlora"]}}
    with pytest.raises(ValueError, match=r"very_sparse=True.*here \d+ and there 3"):
        adapters.insert(held, {"small": configs["small"]}, "large", made["large"], configs["large"])


def test_each_adapter_is_split_saved_and_loaded_by_itself(tmp_path):
    variables, config = alone("math")
    trainable, _ = rl.split(variables, config)
    assert set(trainable) == {"randlora"}
    rl.save_adapter(tmp_path / "math", variables, config)
    loaded, read = rl.load_adapter(tmp_path / "math", {"params": base_params()})
    assert read == config
    assert_same_bits(loaded, variables)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"projection_prng_key": 5}, "projection_prng_key must be the same.*draws the bases"),
        ({"r": 2}, "r must be the same.*num_bases follows"),
        ({"sparse": True}, "sparse must be the same.*ternary or dense"),
        ({"very_sparse": True}, "very_sparse must be the same.*ternary or dense"),
        ({"save_projection": False}, "save_projection must be the same.*for all adapters or"),
        ({"bias": "all"}, r"\['b'\] train biases.*bias='none'"),
        ({"modules_to_save": ["down"]}, r"\['b'\] train biases or modules_to_save"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adapters_that_cannot_share_bases_raise_and_say_why(change, match):
    fields = {"r": 3, "target_modules": "all-linear"}
    other = RandLoraConfig(**{**fields, **change})
    with pytest.raises(ValueError, match=match):
        RandLora(Block(), {"a": RandLoraConfig(**fields), "b": other})


def test_foreign_bases_raise_and_leave_what_was_there():
    first, config = alone("code")
    held = {**first, "randlora": {"code": first["randlora"]}}
    before = jax.tree.map(lambda a: a.copy(), held)
    foreign = jax.tree.map(lambda a: a + 1, first["randlora_bases"])
    with pytest.raises(
        ValueError, match=r"'new' can't be beside \['code'\]: its randlora_[AB] is not"
    ):
        adapters.insert(held, {"code": config}, "new", {**first, "randlora_bases": foreign}, config)
    assert_same_bits(held, before)
