"""A quantised base of an NNX model: stacked blocks, attention, an Einsum."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

import randlora_jax as rl
from randlora_jax.nnx import (
    RandLoraParam,
    inject,
    insert,
    lend_bases,
    load_adapter,
    merge,
    quantize,
    remove,
    set_active,
    trainable,
    variables,
)
from randlora_jax.quantised import is_quantised, type_of
from tests.quantised_models import CONFIG, TYPES, NnxModel, X, equal, kernels, to_floats


def randomise(model, size=0.5):
    rng = np.random.default_rng(3)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, RandLoraParam):
            drawn = rng.uniform(-size, size, variable.get_value().shape)
            variable.set_value(jnp.asarray(drawn, jnp.float32))
    return model


def pair(config=CONFIG, trained=True, how=TYPES["nf4"], **options):
    """Two injected models: over a quantised base, and over its floats."""
    both = [quantize(NnxModel(nnx.Rngs(0)), **how) for _ in range(2)]
    both[1] = to_floats(both[1])
    for model in both:
        inject(model, config, rngs=nnx.Rngs(dropout=1), **options)
    return [randomise(model) for model in both] if trained else both


def gradients(model):
    loss = lambda model, x: jnp.mean(jnp.sin(model(x)))
    of = nnx.DiffState(0, trainable(model))
    value, (scales, x) = nnx.jit(nnx.value_and_grad(loss, argnums=(of, 1)))(model, X)
    return value, nnx.to_pure_dict(scales), x


@pytest.mark.parametrize("strategy", ["merged", "factored"])
@pytest.mark.parametrize("of_type", ["int8", "int4", "nf4"])
def test_results_and_gradients_are_bit_equal_to_those_over_its_floats(of_type, strategy):
    quantised, floating = pair(how=TYPES[of_type], strategy=strategy)
    assert len(kernels(variables(quantised)["params"])) == 7
    assert not kernels(variables(floating)["params"])
    assert equal(gradients(quantised), gradients(floating))


def test_a_quantised_model_runs_before_inject_and_after_remove():
    model = quantize(NnxModel(nnx.Rngs(0)), **TYPES["nf4"])
    y = model(X)
    assert equal(y, to_floats(quantize(NnxModel(nnx.Rngs(0)), **TYPES["nf4"]))(X))
    inject(model, CONFIG.replace(target_modules=["up"]))
    assert equal(model(X), y)
    randomise(model)
    assert not equal(model(X), y)
    set_active(model, ())
    assert equal(model(X), y)
    assert equal(remove(model)(X), y)
    assert all(not hasattr(m, "randlora_config") for _, m in nnx.iter_modules(model))


def test_kernels_are_those_that_qwix_makes():
    model = NnxModel(nnx.Rngs(0))
    old = model.attention.query.kernel.get_value()
    quantize(model, qtype="nf4", tile_size=16, exclude_modules=["heads"])
    new = model.attention.query.kernel.get_value()
    assert equal(new, qwix.quantize(old, "nf4", channelwise_axes=(1, 2), tiled_axes={0: 16}))
    assert type_of(model.blocks.down.kernel.get_value()) == "nf4, 1 x 4 x 16 x 1"
    assert not is_quantised(model.heads.kernel.get_value())


def test_an_injected_model_can_be_quantised_too():
    model = randomise(inject(NnxModel(nnx.Rngs(0)), CONFIG))
    quantize(model, **TYPES["int8"])
    expected, _ = pair(how=TYPES["int8"])
    assert equal(model(X), expected(X))


def test_nnx_variables_that_hold_a_users_own_qarrays():
    model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    array = qwix.quantize(model.kernel.get_value(), "int8", channelwise_axes=(1,))
    model.kernel = nnx.Param(array)
    inject(model, CONFIG)
    np.testing.assert_allclose(model(X), X @ qwix.dequantize(array), rtol=1e-5, atol=1e-5)


def test_dropout_several_adapters_and_their_verbs():
    configs = {"a": CONFIG.replace(randlora_dropout=0.5), "b": CONFIG}
    quantised, floating = pair(configs)
    assert equal(quantised(X), floating(X))
    for model in (quantised, floating):
        model.eval()
        insert(model, "c", CONFIG.replace(target_modules=["down"]))
        set_active(model, ("b", "c"))
    assert equal(gradients(quantised), gradients(floating))


def test_merging():
    quantised, floating = (randomise(m, 0.1) for m in pair(how=TYPES["int8 in tiles"]))
    y = quantised(X)
    merged = merge(nnx.clone(quantised))
    assert not kernels(variables(merged)["params"])
    assert type(merged.blocks.up) is nnx.Linear
    assert equal(variables(merged)["params"], variables(merge(floating))["params"])
    np.testing.assert_allclose(merged(X), y, rtol=1e-4, atol=1e-4 * jnp.abs(y).max())
    with pytest.warns(UserWarning, match="rounded to int8"):
        again = merge(nnx.clone(quantised), requantize=True)
    assert len(kernels(variables(again)["params"])) == 7
    assert 0 < jnp.abs(again(X) - y).max() < 0.5 * jnp.abs(y).max()


def test_saving_and_loading(tmp_path):
    quantised, floating = pair()
    rl.save_adapter(tmp_path / "a", variables(quantised), CONFIG)
    other = quantize(NnxModel(nnx.Rngs(0)), **TYPES["nf4"])
    load_adapter(tmp_path / "a", other)
    assert equal(other(X), quantised(X))
    with pytest.warns(UserWarning, match="trained on a base whose"):
        rl.load_adapter(tmp_path / "a", {"params": variables(floating)["params"]})


def test_it_splits_clones_and_lends_as_any_model():
    quantised, _ = pair()
    y = quantised(X)
    graph, state = nnx.split(quantised)
    assert equal(nnx.merge(graph, state)(X), y)
    assert equal(nnx.clone(quantised)(X), y)
    part = functools.partial(nnx.jit(lambda layer, x: layer(x)), quantised.attention.query)
    with lend_bases(quantised):
        assert part(X).shape == (2, 8, 4, 16)
    abstract = nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0)))
    quantize(abstract, **TYPES["nf4"])
    shape = lambda leaf: (leaf.shape, str(leaf.dtype))
    there, here = (
        jax.tree.map(shape, nnx.to_pure_dict(nnx.state(m, nnx.Param)))
        for m in (abstract, quantize(NnxModel(nnx.Rngs(0)), **TYPES["nf4"]))
    )
    assert there == here


def test_what_qwix_has_wrapped_is_refused():
    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype="int8")]
    wrap = lambda model: qwix.quantize_model(model, qwix.PtqProvider(rules), jnp.ones((1, 64)))
    linear = lambda: nnx.Sequential(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
    for call in (quantize, functools.partial(inject, config=CONFIG)):
        with pytest.raises(ValueError, match=r"randlora_jax\.nnx\.quantize\(model"):
            call(wrap(linear()))
    with pytest.raises(ValueError, match="take an adapter's factors for kernels"):
        wrap(inject(linear(), CONFIG))


def test_quantize_changes_nothing_where_it_fails():
    model = NnxModel(nnx.Rngs(0))
    with pytest.raises(ValueError, match="tile_size=48 does not divide the"):
        quantize(model, qtype="nf4", tile_size=48)
    assert not kernels(variables(model)["params"])
    assert type(model.blocks.up) is nnx.Linear
    with pytest.raises(TypeError, match="model must be an NNX module"):
        quantize({"params": {}})


def test_a_pinned_folder_knows_the_type_of_the_base(tmp_path):
    quantised, floating = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            rl.pin_adapter(tmp_path / "q", variables(quantised), CONFIG)
            rl.pin_adapter(tmp_path / "f", variables(floating), CONFIG)
    with pytest.warns(UserWarning, match="is of nf4, 16 x 1 x 1, and") as told:
        rl.pin_adapter(tmp_path / "q", variables(floating), CONFIG)
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match="is of floats, and this one's is of nf4"):
        rl.pin_adapter(tmp_path / "f", variables(quantised), CONFIG)
