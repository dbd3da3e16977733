"""What `rl.sharding` says: whole scales, and what divides them on request."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import randlora_jax as rl
from randlora_jax.linen import RandLora
from randlora_jax.nnx import (
    inject,
)
from tests.placing import CONFIG, RULES, X, linen_variables, mesh, nnx_linear, put, specs
from tests.pods import exchanged


@pytest.mark.parametrize(
    "data_axes, gamma",
    [(None, P()), (["data"], P()), (["model"], P(None, "data")), ([], P(None, "data"))],
)
def test_gammas_are_divided_on_request_alone(data_axes, gamma):
    whole = lambda spec: P(*(entry for entry in spec)) if any(spec) else P()
    layer = inject(nnx_linear("data", "model"), CONFIG, data_axes=data_axes)
    assert whole(layer.randlora_gamma.get_value().sharding.spec) == gamma
    variables = RandLora(nn.Dense(32, use_bias=False), CONFIG).adapt(linen_variables(), X)
    found = rl.sharding(variables, CONFIG, data_axes=data_axes)["randlora"]
    assert whole(found["randlora_gamma"].spec) == gamma
    assert whole(found["randlora_lambda"].spec) == P()


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(16, use_bias=False, name="dense")(x), None


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 4}
        return nn.scan(Layer, **options)(name="layers")(x, None)[0]


def test_rows_that_an_axis_does_not_divide_are_whole():
    params = Layers().init(jax.random.key(0), X)["params"]
    params = jax.tree.map(lambda a: put(a, "data", None, None), params)
    config = CONFIG.replace(
        target_modules=["dense"], layers_to_transform=[0, 1, 2], layers_pattern="layers"
    )
    adapted = RandLora(Layers(), config).adapt({"params": params}, X)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(adapted["randlora"])} == {3}
    moved = jax.device_put(adapted, rl.sharding(adapted, config))
    for leaf in jax.tree.leaves(moved["randlora"]):
        assert leaf.sharding.is_fully_replicated


@pytest.mark.parametrize("zero_axes, divided", [(["data"], "data"), (["data", "model"], "data")])
def test_zero_takes_the_axes_that_fit(zero_axes, divided):
    variables = RandLora(nn.Dense(14), CONFIG).init(jax.random.key(0), jnp.ones((1, 12)))
    found = rl.sharding(variables, CONFIG, mesh(), zero_axes=zero_axes)["randlora"]
    assert found["randlora_gamma"].spec == P(None, divided)


def test_names_of_a_plain_box_are_axes_of_the_mesh():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
    model = RandLora(nn.Dense(32, kernel_init=init), CONFIG)
    boxed = jax.eval_shape(model.init, jax.random.key(0), X)
    with nn.logical_axis_rules(RULES):
        found = rl.sharding(boxed, CONFIG, mesh())
    assert found["params"]["kernel"].spec == P("data", "model")
    found = rl.sharding(boxed, CONFIG, mesh(), rules=RULES)
    assert found["params"]["kernel"].spec == P("data", "model")
    layout = model.with_layout(boxed, NamedSharding(mesh(), P("data"))).layout
    assert layout.told(()).kernel == (("data",), ("model",))


def test_several_adapters_have_shardings():
    configs = {"a": CONFIG, "b": CONFIG}
    variables = RandLora(nn.Dense(32, use_bias=False), configs).adapt(linen_variables(), X)
    found = rl.sharding(variables, configs, data_axes=[])["randlora"]
    assert {name: tree["randlora_gamma"].spec for name, tree in found.items()} == {
        "a": P(None, "data"), "b": P(None, "data"),
    }  # fmt: skip


def logical(*names):
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)


@pytest.mark.parametrize("given", ["argument", "context", "box"])
def test_logical_axis_names_are_read_by_their_rules(given):
    init = logical("embed", "mlp")
    if given == "box":
        init = nn.with_logical_partitioning(
            nn.initializers.lecun_normal(), ("embed", "mlp"), rules=RULES
        )
    model = RandLora(nn.Dense(32, use_bias=False, kernel_init=init), CONFIG)
    boxed = model.init(jax.random.key(0), X)
    on, options = mesh(), {"rules": RULES} if given == "argument" else {}
    with nn.logical_axis_rules(RULES if given == "context" else ()), jax.set_mesh(on):
        shardings = rl.sharding(boxed, CONFIG, on, data_axes=["model"], **options)
        abstract = jax.eval_shape(model.init, jax.random.key(0), X)
        assert rl.sharding(abstract, CONFIG, on, data_axes=["model"], **options) == shardings
        variables = jax.device_put(boxed, shardings)
        y = jax.jit(model.apply)(variables, X)
    assert specs(trees_of(variables)["params"]) == {"kernel": P("data", "model")}
    assert trees_of(variables)["randlora"]["randlora_gamma"].sharding.spec == P(None, "data")
    plain = jax.tree.map(np.asarray, trees_of(variables))
    np.testing.assert_allclose(y, model.apply(plain, X), rtol=1e-5)


def trees_of(boxed):
    return jax.tree.map(
        lambda box: box.value if isinstance(box, nn.Partitioned) else box,
        boxed,
        is_leaf=lambda box: isinstance(box, nn.Partitioned),
    )


def test_logical_names_without_rules_are_refused_with_what_to_give():
    model = RandLora(nn.Dense(32, kernel_init=logical("embed", "mlp")), CONFIG)
    boxed = model.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"kernel' has an axis called 'embed'.*rules=\[\('embed'"):
        rl.sharding(boxed, CONFIG, mesh())


@pytest.mark.parametrize("features", [(16, 32), (32, 16), (12, 32)])
def test_zero_divides_gammas_and_the_state_of_the_optimizer(features):
    params = {"kernel": put(jnp.ones(features))}
    x = jax.random.normal(jax.random.key(1), (8, features[0]))
    model = RandLora(nn.Dense(features[1], use_bias=False), CONFIG)
    variables = model.adapt({"params": params}, x)
    shardings = rl.sharding(variables, CONFIG, zero_axes=["data"])
    variables = jax.device_put(variables, shardings)
    trainable, frozen = rl.split(variables, CONFIG)
    tx = optax.adam(1e-2)
    state = tx.init(trainable)
    state = jax.device_put(state, rl.state_sharding(state, mesh()))
    gamma = trainable["randlora"]["randlora_gamma"]
    assert not gamma.sharding.is_fully_replicated
    assert state[0].mu["randlora"]["randlora_gamma"].sharding == gamma.sharding
    assert state[0].count.sharding.is_fully_replicated
    assert len(state[0].count.sharding.device_set) == 8

    def step(trainable, state, frozen, x):
        loss = lambda t: jnp.mean(jnp.square(model.apply(rl.combine(t, frozen), x) - 1))
        with jax.numpy_dtype_promotion("standard"):  # which optax needs
            updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    compiled = jax.jit(step).lower(trainable, state, frozen, put(x, "data")).compile()
    new, _ = compiled(trainable, state, frozen, put(x, "data"))
    assert new["randlora"]["randlora_gamma"].sharding.is_equivalent_to(gamma.sharding, 2)
    # The price: forward and backward pass fetch a gamma, and nothing else.
    assert exchanged(compiled)["all-gather"] <= 2 * gamma.nbytes
    host = jax.tree.map(np.asarray, (trainable, state, frozen, x))
    for got, wanted in zip(jax.tree.leaves(new), jax.tree.leaves(step(*host)[0]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("field", ["data_axes", "zero_axes", "bases_axes"])
def test_axes_that_are_none_are_refused(field):
    variables = RandLora(nn.Dense(32, use_bias=False), CONFIG).adapt(linen_variables(), X)
    with pytest.raises(ValueError, match=f"{field}: 'rows' is no axis of the mesh"):
        rl.sharding(variables, CONFIG, **{field: ["rows"]})
    with pytest.raises(TypeError, match=rf"{field} must be a list of names, as in \['data'\]"):
        rl.sharding(variables, CONFIG, **{field: "data"})
