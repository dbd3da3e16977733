"""Making, refusing, merging, saving and placing a quantised base of a Linen model."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import randlora_jax as rl
from randlora_jax import trees
from randlora_jax.linen import RandLora, quantize
from randlora_jax.quantised import type_of
from tests.linen_cases import randomised
from tests.quantised_models import (
    CONFIG,
    MODELS,
    Dense,
    X,
    equal,
    kernels,
    of,
    variables_of,
)


def test_merged_floats_are_those_of_the_float_base():
    for name in MODELS:
        model = of(name)
        quantised, floating = variables_of(model, qtype="nf4", tile_size=16)
        merged = model.merge(quantised, X)
        assert not kernels(merged)
        assert equal(merged, model.merge(floating, X))
        y = model.base.apply({"params": merged}, X)
        expected = model.apply(quantised, X)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * jnp.abs(expected).max())


def test_merging_makes_floats_of_layers_without_an_update_too():
    model = of("Dense", target_modules=["up"])
    quantised, _ = variables_of(model, qtype="int8")
    assert not kernels(model.merge(quantised))
    with pytest.warns(UserWarning, match="rounded to int8"):
        again = rl.merge(quantised, model.config, requantize=True)
    assert again["down"]["kernel"] is quantised["params"]["down"]["kernel"]


def test_requantising_tells_what_is_lost():
    model = of("Dense")
    quantised, _ = variables_of(model, qtype="nf4", tile_size=16)
    exact = model.apply(quantised, X)
    said = r"rounded to nf4, 16 x 1 again: the error is \d+% of"
    with pytest.warns(UserWarning, match=said) as told:
        merged = model.merge(quantised, requantize=True)
    assert told[0].filename == __file__
    before = {name: type_of(leaf) for name, leaf in kernels(quantised["params"]).items()}
    assert {name: type_of(leaf) for name, leaf in kernels(merged).items()} == before
    y = model.clone(active=()).apply({"params": merged}, X)
    assert 0 < jnp.abs(y - exact).max() < 0.5 * jnp.abs(exact).max()

    small = jax.tree.map(lambda a: 1e-2 * a, quantised["randlora"])
    with pytest.warns(UserWarning, match="2 of 2 kernels the update is smaller than the grid"):
        model.merge({**quantised, "randlora": small}, requantize=True)


def test_merging_warns_of_nothing_where_floats_come_out():
    model = of("Dense")
    quantised, floating = variables_of(model, qtype="int8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge(quantised)
        model.merge(floating, requantize=True)


def test_only_the_named_kernels_are_quantised():
    params = Dense().init(jax.random.key(0), X)
    some = quantize(Dense(), params, X, qtype="int8", exclude_modules=["down"])
    assert [*kernels(some["params"])] == ["up.kernel"]
    more = quantize(Dense(), some, X, qtype="nf4", tile_size=16)
    assert type_of(more["params"]["up"]["kernel"]) == "int8, 64 x 1"
    assert type_of(more["params"]["down"]["kernel"]) == "nf4, 16 x 1"


def test_donated_kernels_are_gone_and_abstract_ones_stay_abstract():
    params = Dense().init(jax.random.key(0), X)
    kept = quantize(Dense(), params, X, qtype="int8")
    shapes = quantize(Dense(), jax.eval_shape(lambda: params), X, qtype="int8")
    assert jax.tree.map(lambda a: (a.shape, a.dtype), kept) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes
    )
    donated = quantize(Dense(), params, X, qtype="int8", donate=True)
    assert equal(donated, kept)
    assert params["params"]["up"]["kernel"].is_deleted()
    assert not params["params"]["up"]["bias"].is_deleted()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qtype": "int9"}, "qtype='int9' is no type"),
        ({"qtype": "bfloat16"}, "qtype='bfloat16' is no type"),
        ({"tile_size": 48}, "tile_size=48 does not divide the 64 inputs of 'up.kernel'"),
        ({"tile_size": 0}, "tile_size must be a number of inputs"),
        ({"target_modules": ["nothing"]}, "nothing"),
    ],
)
def test_quantize_refuses_before_any_work(options, message):
    params = Dense().init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=message):
        quantize(Dense(), params, X, donate=True, **options)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_models_that_qwix_has_wrapped_are_refused():
    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype="int8", act_qtype="int8")]
    wrap = lambda model: qwix.quantize_model(model, qwix.PtqProvider(rules))
    with pytest.raises(ValueError, match="give the model itself"):
        RandLora(wrap(Dense()), CONFIG)
    with pytest.raises(ValueError, match="give the model itself"):
        quantize(wrap(Dense()), Dense().init(jax.random.key(0), X), X)
    model = of("Dense")
    variables, _ = variables_of(model, qtype="int8")
    for call in (model.adapt, model.apply):
        with pytest.raises(ValueError, match="give the model itself"):
            getattr(wrap(model), call.__name__)(variables, X)


def test_what_trains_can_not_be_quantised():
    model = of("Dense", target_modules=["up"], modules_to_save=["down"])
    variables, _ = variables_of(model, qtype="int8")
    with pytest.raises(ValueError, match=r"names 'down\.kernel', which is quantised"):
        rl.split(variables, model.config)
    model = of("Dense", bias="all")
    trainable, _ = rl.split(variables_of(model, qtype="int8")[0], model.config)
    assert set(trainable["params"]["up"]) == {"bias"}


def test_integer_kernels_without_scales_are_refused():
    params = Dense().init(jax.random.key(0), X)["params"]
    params["up"]["kernel"] = params["up"]["kernel"].astype(jnp.int8)
    with pytest.raises(ValueError, match="codes with their scales, as quantize makes"):
        of("Dense").adapt({"params": params}, X)


def test_adapters_are_saved_and_say_on_which_base_they_were_trained(tmp_path):
    model = of("Scanned")
    quantised, floating = variables_of(model, qtype="nf4", tile_size=16)
    rl.save_adapter(tmp_path / "a", quantised, CONFIG)
    base = {"params": quantised["params"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, config = rl.load_adapter(tmp_path / "a", base)
    assert config == CONFIG and equal(loaded, quantised)
    with pytest.warns(UserWarning, match="is of nf4, 1 x 16 x 1, and this one's is of floats") as w:
        rl.load_adapter(tmp_path / "a", {"params": floating["params"]})
    assert w[0].filename == __file__
    rl.save_adapter(tmp_path / "b", floating, CONFIG)
    with pytest.warns(UserWarning, match="is of floats, and this one's is of nf4"):
        rl.load_adapter(tmp_path / "b", base)


def test_peft_files_go_both_ways(tmp_path):
    model = of("Dense")
    quantised, floating = variables_of(model, qtype="int8")
    rl.peft.save_adapter(tmp_path / "q", quantised, CONFIG)
    rl.peft.save_adapter(tmp_path / "f", floating, CONFIG)
    one, other = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("q", "f"))
    assert one == other
    loaded, _ = rl.peft.load_adapter(tmp_path / "q", {"params": quantised["params"]})
    np.testing.assert_array_equal(model.apply(loaded, X), model.apply(quantised, X))


def test_the_summary_tells_what_the_base_takes_and_saves():
    model = of("Dense")
    quantised, floating = variables_of(model, qtype="nf4", tile_size=16)
    # Codes of 4 bits, a scale of 4 bytes for each 16 of them, 192 biases.
    codes = 2 * 64 * 128
    size, saved = codes // 2 + codes // 16 * 4 + 192 * 4, codes * 4 - codes // 2 - codes // 16 * 4
    line = f"{size / 1000:.2f} kB, {saved / 1000:.2f} kB less by quantised kernels (2 nf4)"
    assert line in rl.summary(quantised, CONFIG)
    assert "quantised" not in rl.summary(floating, CONFIG)


def test_boxes_with_names_keep_them():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            return nn.Dense(128, kernel_init=init, name="up")(x)

    params = Boxed().init(jax.random.key(0), X)
    model = RandLora(Boxed(), CONFIG)
    quantised = quantize(Boxed(), params, X, qtype="nf4", tile_size=16)
    assert quantised["params"]["up"]["kernel"].names == ("embed", "mlp")
    variables = model.adapt(quantised, X)
    variables["randlora"] = randomised(variables["randlora"])
    merged = model.merge(variables)
    assert merged["up"]["kernel"].names == ("embed", "mlp")
    mesh = jax.make_mesh((4, 2), ("embed", "mlp"), axis_types=(AxisType.Auto,) * 2)
    divided = jax.device_put(variables, rl.sharding(variables, CONFIG, mesh))
    kernel = divided["params"]["up"]["kernel"].value
    assert kernel.qvalue.sharding.spec == kernel.scale.sharding.spec == P("embed", "mlp")
    expected = model.apply(variables, X)
    np.testing.assert_allclose(model.apply(divided, X), expected, rtol=1e-4, atol=1e-4)
    y = Boxed().apply({"params": merged}, X)
    np.testing.assert_allclose(model.apply(variables, X), y, rtol=1e-4, atol=1e-4)
    # What qwix itself makes of it has the box inside.
    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype="nf4", tile_size=16)]
    peer = qwix.quantize_model(Boxed(), qwix.PtqProvider(rules))
    theirs = peer.init(jax.random.key(0), X)
    variables = model.adapt(theirs, X)
    assert equal(model.apply(variables, X), peer.apply(theirs, X))
    divided = jax.device_put(variables, rl.sharding(variables, CONFIG, mesh))
    codes = trees.array_of(divided["params"]["up"]["kernel"])
    assert codes.sharding.spec == P("embed", "mlp")
