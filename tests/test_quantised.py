"""A quantised base of a Linen model: it computes what its floats would, and trains as they do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix

import randlora_jax as rl
from randlora_jax import trees
from randlora_jax.linen import RandLora, quantize
from randlora_jax.quantised import is_quantised, type_of
from tests.linen_cases import normal
from tests.quantised_models import (
    CONFIG,
    MODELS,
    TYPES,
    Dense,
    X,
    as_floats,
    equal,
    gradients,
    kernels,
    of,
    variables_of,
)


def qwix_model(base, qtype, tile_size=None):
    """(qwix's own quantised model, its parameters, the floats that they are made of)."""
    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype=qtype, tile_size=tile_size)]
    model = qwix.quantize_model(base, qwix.PtqProvider(rules))
    params = base.init(jax.random.key(0), X)["params"]
    abstract = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    return model, qwix.quantize_params(params, abstract), params


@pytest.mark.parametrize("name", ["Dense", "Attention"])
@pytest.mark.parametrize("how", TYPES.values(), ids=TYPES)
def test_it_starts_bit_equal_to_qwix_s_own_model(name, how):
    peer, params, _ = qwix_model(MODELS[name], **how)
    model = of(name)
    variables = model.adapt({"params": params}, X)
    assert equal(model.apply(variables, X), peer.apply({"params": params}, X))
    off = model.clone(active=())
    assert equal(off.apply({"params": params}, X), peer.apply({"params": params}, X))


def test_einsums_start_as_flax_s_own_on_the_floats():  # qwix's own sums in another order
    peer, params, _ = qwix_model(MODELS["Einsum"], "nf4", 16)
    variables = of("Einsum").adapt({"params": params}, X)
    y = of("Einsum").apply(variables, X)
    assert equal(y, MODELS["Einsum"].apply({"params": as_floats(params)}, X))
    np.testing.assert_allclose(y, peer.apply({"params": params}, X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Dense", "Attention", "Einsum"])
@pytest.mark.parametrize("how", TYPES.values(), ids=TYPES)
def test_quantize_gives_what_qwix_gives(name, how):
    _, theirs, params = qwix_model(MODELS[name], **how)
    ours = quantize(MODELS[name], {"params": params}, X, **how)["params"]
    theirs = {trees.dotted(path): trees.unboxed(leaf) for path, leaf in trees.items(theirs)}
    assert kernels(ours).keys() == {name for name, leaf in theirs.items() if is_quantised(leaf)}
    for path, leaf in kernels(ours).items():
        assert type_of(leaf) == type_of(theirs[path])
        assert equal(leaf, theirs[path])


@pytest.mark.parametrize("strategy", ["merged", "factored"])
@pytest.mark.parametrize(
    ("name", "of_type"),
    [(name, "nf4") for name in MODELS if name != "Einsum"]
    + [("Dense", of_type) for of_type in TYPES if of_type != "nf4"],
)
def test_results_and_gradients_are_bit_equal_to_those_over_its_floats(name, of_type, strategy):
    model = of(name).clone(strategy=strategy)
    quantised, floating = variables_of(model, **TYPES[of_type])
    assert len(kernels(quantised["params"])) == len(kernels_of(name))
    assert equal(gradients(model, quantised), gradients(model, floating))


@pytest.mark.parametrize("active", [None, ()], ids=["adapted", "frozen"])
@pytest.mark.parametrize("strategy", ["merged", "factored"])
def test_an_einsum_has_the_numbers_of_its_floats_if_not_the_bits(strategy, active):
    """Over floats it sums by itself, over codes our product does."""
    model = of("Einsum").clone(strategy=strategy)
    quantised, floating = variables_of(model, qtype="nf4", tile_size=16)
    model = model.clone(active=active)
    results = gradients(model, quantised), gradients(model, floating)
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * jnp.abs(theirs).max())


def kernels_of(name):
    return {
        "Dense": ("up", "down"),
        "Attention": ("query", "key", "value", "out", "heads"),
        "Scanned": ("up", "down"),
        "Experts": ("lifted", "inside"),
        "Einsum": ("heads",),
        "Raw": ("w",),
    }[name]


@pytest.mark.parametrize("name", ["Dense", "Scanned", "Experts", "Attention"])
def test_layers_without_an_update_keep_their_product(name):
    model = of(name, target_modules=[kernels_of(name)[-1]])
    quantised, floating = variables_of(model, qtype="nf4", tile_size=16)
    assert equal(gradients(model, quantised), gradients(model, floating))
    off = model.clone(active=())
    assert equal(off.apply(quantised, X), off.apply(floating, X))


@pytest.mark.parametrize(
    "how",
    [
        {"qtype": "int3"},
        {"qtype": "int2", "tile_size": 16},
        {"qtype": "mxfp4", "tile_size": 32},
        {"qtype": "nvfp4", "tile_size": 16},
        {"qtype": jnp.float8_e5m2},
    ],
    ids=lambda how: str(how["qtype"]),
)
def test_every_type_of_qwix_s_will_do(how):
    model = of("Dense")
    quantised, floating = variables_of(model, **how)
    own = jax.tree.map(
        lambda q: qwix.dequantize(q) if is_quantised(q) else q,
        quantised["params"],
        is_leaf=is_quantised,
    )
    assert equal(own, floating["params"])
    assert equal(gradients(model, quantised), gradients(model, floating))


def test_codes_with_a_zero_point():
    model = of("Dense")
    _, floating = variables_of(model, qtype="int8")
    options = {"tiled_axes": {0: 16, 1: 1}, "calibration_method": "minmax"}
    params = {
        name: {**layer, "kernel": qwix.quantize(layer["kernel"], "int8", **options)}
        for name, layer in floating["params"].items()
    }
    quantised = {**floating, "params": params}
    assert params["up"]["kernel"].zero_point is not None
    floating = {**floating, "params": as_floats(params)}
    assert equal(floating["params"]["up"]["kernel"], qwix.dequantize(params["up"]["kernel"]))
    assert equal(gradients(model, quantised), gradients(model, floating))
    with pytest.warns(UserWarning, match="rounded to int8, 16 x 1"):
        merged = model.merge(quantised, requantize=True)
    assert merged["up"]["kernel"].zero_point.shape == (4, 128)


def test_bfloat16_bases_compute_in_bfloat16():
    model = of("Dense")
    quantised, floating = variables_of(model, qtype="nf4", tile_size=16)
    half = lambda tree: jax.tree.map(
        lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, tree
    )
    x = X.astype(jnp.bfloat16)
    quantised, floating = ({**v, "params": half(v["params"])} for v in (quantised, floating))
    floating["params"] = jax.tree.map(
        lambda q: qwix.dequantize(q) if is_quantised(q) else q,
        quantised["params"],
        is_leaf=is_quantised,
    )
    ours, theirs = (gradients(model, v, x) for v in (quantised, floating))
    assert model.apply(quantised, x).dtype == jnp.bfloat16
    assert equal(ours, theirs)


def test_dropout_and_several_adapters():
    configs = {"a": CONFIG.replace(randlora_dropout=0.5), "b": CONFIG.replace(randlora_alpha=3)}
    model = RandLora(Dense(), configs, deterministic=False)
    quantised, floating = variables_of(model, qtype="nf4", tile_size=16)
    options = {"rngs": {"dropout": jax.random.key(5)}}
    ours, theirs = (gradients(model, v, **options) for v in (quantised, floating))
    assert equal(ours, theirs)
    for active in ((), ("b",), ("a",)):
        one = model.clone(active=active)
        ours, theirs = (one.apply(v, X, **options) for v in (quantised, floating))
        assert equal(ours, theirs)


def test_an_adapter_within_another_module():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return RandLora(Dense(name="inner"), CONFIG)(x)

    variables = Outer().init(jax.random.key(0), X)
    part = {"params": variables["params"]["inner"]}
    inner = quantize(Dense(), part, X, qtype="nf4", tile_size=16)["params"]
    quantised = {**variables, "params": {"inner": inner}}
    model = RandLora(Dense(), CONFIG)
    alone = {"params": inner, **{c: variables[c]["inner"] for c in ("randlora", "randlora_bases")}}
    assert equal(Outer().apply(quantised, X), model.apply(alone, X))


def test_it_trains():
    model = of("Dense")
    variables, _ = variables_of(model, trained=False, qtype="nf4", tile_size=16)
    target = normal(3, *X.shape)
    trainable, frozen = rl.split(variables, CONFIG)
    tx = optax.adam(1e-2)

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            return jnp.mean((model.apply(rl.combine(trainable, frozen), X) - target) ** 2)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = tx.init(trainable), []
    for _ in range(100):
        with jax.numpy_dtype_promotion("standard"):  # optax's own
            trainable, state, value = step(trainable, state)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]


def test_a_layer_with_several_kernels_runs_on_their_floats():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            a, b = (
                self.param(n, nn.initializers.lecun_normal(), s)
                for n, s in (("a", (64, 128)), ("b", (128, 64)))
            )
            return jnp.tanh(x @ a) @ b

    rl.register_layer(Two, {"a": (0,), "b": (0,)})
    model = RandLora(Two(), CONFIG)
    quantised, floating = variables_of(model, qtype="nf4", tile_size=16)
    assert [*kernels(quantised["params"])] == ["a", "b"]
    assert equal(gradients(model, quantised), gradients(model, floating))
    off = model.clone(active=())
    assert equal(off.apply(quantised, X), off.apply(floating, X))


def test_a_layer_with_a_product_of_its_own_keeps_it():
    def rounded(x, kernel, *args, **options):
        return jax.lax.dot_general(jnp.round(x * 4) / 4, kernel, *args, **options)

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(128, dot_general=rounded, name="up")(x)

    model = RandLora(Own(), CONFIG)
    quantised, floating = variables_of(model, qtype="nf4", tile_size=16)
    assert equal(gradients(model, quantised), gradients(model, floating))
    off = model.clone(active=())
    assert equal(off.apply(quantised, X), off.apply(floating, X))
