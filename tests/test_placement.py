"""Where adapters, bases and optimizers live: on the base's mesh at once, and as users ask."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import randlora_jax as rl
from randlora_jax.linen import RandLora
from randlora_jax.nnx import (
    RandLoraBasis,
    RandLoraParam,
    inject,
    insert,
    load_adapter,
    set_layout,
    variables,
)
from tests.pods import exchanged

CONFIG = rl.RandLoraConfig(r=4, target_modules="all-linear")
X = jnp.ones((8, 16))
RULES = (("embed", "data"), ("mlp", "model"), ("layers", None))


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def put(array, *axes, on=None):
    return jax.device_put(array, NamedSharding(on or mesh(), P(*axes)))


def linen_variables(stacked=False):
    shape = (3, 16, 32) if stacked else (16, 32)
    axes = ("model", None, None) if stacked else ("data", "model")
    return {"params": {"kernel": put(jnp.ones(shape)[:2] if stacked else jnp.ones(shape), *axes)}}


def nnx_linear(*axes, kind=AxisType.Auto):
    layer = nnx.Linear(16, 32, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel.set_value(put(layer.kernel.get_value(), *axes, on=mesh(kind)))
    return layer


def specs(tree):
    return jax.tree.map(lambda a: a.sharding.spec, tree)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_what_is_added_is_on_the_mesh_of_the_base(kind):
    on = mesh(kind)
    params = {"kernel": put(jnp.ones((16, 32)), "data", "model", on=on)}
    model = RandLora(nn.Dense(32, use_bias=False), CONFIG)
    with jax.set_mesh(on):
        variables = model.adapt({"params": params}, put(X, "data", on=on))
    added = {name: variables[name] for name in ("randlora", "randlora_bases")}
    layer = inject(nnx_linear("data", "model", kind=kind), CONFIG)
    state = nnx.state(layer, nnx.Any(RandLoraParam, RandLoraBasis))
    for leaf in (*jax.tree.leaves(added), *jax.tree.leaves(state)):
        assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8
    assert variables["params"]["kernel"] is params["kernel"]


def test_a_model_that_is_on_no_mesh_stays_where_it_is():
    variables = RandLora(nn.Dense(4), CONFIG).init(jax.random.key(0), X)
    layer = inject(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), CONFIG)
    for leaf in jax.tree.leaves((variables, nnx.state(layer))):
        assert len(leaf.sharding.device_set) == 1


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


def test_an_adapter_that_is_inserted_is_on_the_mesh_too():
    layer = inject(nnx_linear("data", "model"), {"a": CONFIG})
    insert(layer, "b", CONFIG, data_axes=["model"])
    scales = {path[-1]: v.get_value() for path, v in nnx.to_flat_state(nnx.state(layer))}
    assert scales["randlora_gamma:a"].sharding.is_fully_replicated
    assert scales["randlora_gamma:b"].sharding.spec == P(None, "data")


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = lambda layer, x: (layer(x), None)
        scanned = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scanned(nn.Dense(16, use_bias=False, name="layer"), x)[0]


def test_scales_of_a_stack_are_divided_as_its_layers_are():
    params = Stack().init(jax.random.key(0), X)["params"]
    params = jax.tree.map(lambda a: put(a, "model", "data", None), params)
    variables = RandLora(Stack(), CONFIG).adapt({"params": params}, X)
    for tree in (specs(variables), jax.tree.map(lambda s: s.spec, rl.sharding(variables, CONFIG))):
        assert set(jax.tree.leaves(tree["randlora"])) == {P("model", None, None)}


def test_a_spec_may_leave_out_what_is_not_divided():
    def divided(spec):
        @nnx.vmap
        def make(key):
            return nnx.Linear(16, 10, use_bias=False, rngs=nnx.Rngs(key))

        class Stacked(nnx.Module):
            def __init__(self):
                self.layers = make(jax.random.split(jax.random.key(0), 4))

        model = Stacked()
        kernel = model.layers.kernel
        kernel.set_value(jax.device_put(kernel.get_value(), NamedSharding(mesh(), spec)))
        inject(model, CONFIG, data_axes=["model"])
        return model.layers.randlora_gamma.get_value().sharding.spec

    assert divided(P("data")) == divided(P("data", None, None)) == P("data", None, None)
    params = {"layer": {"kernel": put(jnp.ones((2, 16, 16)), "model")}}
    variables = RandLora(Stack(), CONFIG).adapt({"params": params}, X)
    assert set(jax.tree.leaves(specs(variables["randlora"]))) == {P("model", None, None)}


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


def test_what_is_loaded_is_on_the_mesh_and_divided_as_before(tmp_path):
    layer = nnx.Linear(16, 32, rngs=nnx.Rngs(0))  # its bias is on no mesh
    layer.kernel.set_value(put(layer.kernel.get_value(), "model", None))
    inject(layer, CONFIG, data_axes=["data"])
    before = layer.randlora_gamma.get_value().sharding
    assert before.spec == P(None, "model")
    rl.save_adapter(tmp_path / "adapter", variables(layer), CONFIG)
    load_adapter(tmp_path / "adapter", layer)
    assert layer.randlora_gamma.get_value().sharding == before
    assert layer(put(X, "data")).shape == (8, 32)


def test_what_is_added_to_an_abstract_model_is_abstract():
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
    make = lambda: nnx.Linear(16, 32, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0))
    with jax.set_mesh(mesh()):
        layer = inject(nnx.eval_shape(make), CONFIG)
        set_layout(layer, put(X, "data"))
    for leaf in jax.tree.leaves(nnx.state(layer)):
        assert isinstance(leaf, jax.ShapeDtypeStruct)
    ((_, told),) = layer.randlora_layer.told
    assert (told.tokens, told.kernel) == ((("data",),), (("data",), ("model",)))


class One(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, use_bias=False)(x)


def test_a_model_that_is_told_is_pickled_and_runs_on_another_mesh():
    model = RandLora(One(), CONFIG)
    adapted = model.adapt({"params": {"Dense_0": linen_variables()["params"]}}, X)
    scales = jax.tree.map(lambda a: a + 0.1, adapted["randlora"])
    adapted = {**adapted, "randlora": scales}
    told = pickle.loads(pickle.dumps(model.with_layout(adapted, put(X, "data"))))
    layer = inject(nnx_linear("data", "model"), CONFIG)
    set_layout(layer, put(X, "data"))
    again = pickle.loads(pickle.dumps(layer))
    np.testing.assert_allclose(again(X), layer(X), rtol=1e-4)
    expected = model.apply(jax.tree.map(np.asarray, adapted), X)
    np.testing.assert_allclose(told.apply(adapted, X), expected, rtol=1e-5)
    other = jax.make_mesh((2, 2), ("rows", "columns"), devices=jax.devices()[:4],
                          axis_types=(AxisType.Auto,) * 2)  # fmt: skip
    moved = jax.device_put(jax.tree.map(np.asarray, adapted), NamedSharding(other, P()))
    with jax.set_mesh(other):
        for run in (told.apply, jax.jit(told.apply)):
            np.testing.assert_allclose(run(moved, X), expected, rtol=1e-5)


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


def test_logical_names_in_nnx():
    init = nnx.with_metadata(
        nnx.initializers.lecun_normal(), out_sharding=("embed", "mlp"), sharding_rules=RULES
    )
    with jax.set_mesh(mesh()):
        layer = nnx.Linear(16, 32, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0))
    inject(layer, CONFIG, data_axes=["model"])  # outside of the mesh's context
    assert layer.randlora_gamma.get_value().sharding.spec == P(None, "data")
    assert layer.randlora_B.get_value().sharding.is_fully_replicated


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


def test_the_state_of_an_nnx_optimizer_is_on_the_mesh():
    layer = inject(nnx_linear("data", "model"), CONFIG)
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=RandLoraParam)
    state = nnx.state(optimizer)
    state = jax.device_put(state, rl.state_sharding(state, mesh()))
    for leaf in jax.tree.leaves(state):
        assert len(leaf.sharding.device_set) == 8


@pytest.mark.parametrize("field", ["data_axes", "zero_axes"])
def test_axes_that_are_none_are_refused(field):
    variables = RandLora(nn.Dense(32, use_bias=False), CONFIG).adapt(linen_variables(), X)
    with pytest.raises(ValueError, match=f"{field}: 'rows' is no axis of the mesh"):
        rl.sharding(variables, CONFIG, **{field: ["rows"]})
    with pytest.raises(TypeError, match=rf"{field} must be a list of names, as in \['data'\]"):
        rl.sharding(variables, CONFIG, **{field: "data"})


def test_a_layout_needs_a_batch_on_the_mesh_of_the_kernels():
    model = RandLora(nn.Dense(32, use_bias=False), CONFIG)
    variables = model.adapt(linen_variables(), X)
    for batch in (X, P("data"), jax.ShapeDtypeStruct(X.shape, X.dtype)):
        with pytest.raises(ValueError, match=r"batch is on no mesh.*NamedSharding\(mesh"):
            model.with_layout(variables, batch)
    with pytest.raises(ValueError, match=r"but traced: outside of jax\.jit"):
        jax.jit(lambda v, x: model.with_layout(v, x).apply(v, x))(variables, put(X, "data"))
    lost = jax.eval_shape(lambda v: v, variables)
    with pytest.raises(ValueError, match=r"'kernel' has no sharding, but is abstract"):
        model.with_layout(lost, put(X, "data"))
    other = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"'kernel' is on another mesh than the batch"):
        model.with_layout(variables, put(X, "data", on=other))
