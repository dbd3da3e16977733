"""Where adapters, bases and optimizers are put: on the base's mesh, at once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
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
    variables,
)
from tests.placing import CONFIG, RULES, Stack, X, mesh, nnx_linear, put, specs


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


def test_an_adapter_that_is_inserted_is_on_the_mesh_too():
    layer = inject(nnx_linear("data", "model"), {"a": CONFIG})
    insert(layer, "b", CONFIG, data_axes=["model"])
    scales = {path[-1]: v.get_value() for path, v in nnx.to_flat_state(nnx.state(layer))}
    assert scales["randlora_gamma:a"].sharding.is_fully_replicated
    assert scales["randlora_gamma:b"].sharding.spec == P(None, "data")


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


def test_logical_names_in_nnx():
    init = nnx.with_metadata(
        nnx.initializers.lecun_normal(), out_sharding=("embed", "mlp"), sharding_rules=RULES
    )
    with jax.set_mesh(mesh()):
        layer = nnx.Linear(16, 32, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0))
    inject(layer, CONFIG, data_axes=["model"])  # outside of the mesh's context
    assert layer.randlora_gamma.get_value().sharding.spec == P(None, "data")
    assert layer.randlora_B.get_value().sharding.is_fully_replicated


def test_the_state_of_an_nnx_optimizer_is_on_the_mesh():
    layer = inject(nnx_linear("data", "model"), CONFIG)
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=RandLoraParam)
    state = nnx.state(optimizer)
    state = jax.device_put(state, rl.state_sharding(state, mesh()))
    for leaf in jax.tree.leaves(state):
        assert len(leaf.sharding.device_set) == 8
