"""NNX models on a mesh of 8 devices: shardings come from the kernels, and numbers stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from randlora_jax.nnx import RandLoraParam, inject, merge, update, variables
from tests.nnx_models import CONFIG, assert_close, randomised

D = 8


class Block(nnx.Module):
    """A layer divided by its outputs, and one divided by its inputs."""

    def __init__(self, *, rngs):
        init = nnx.initializers.lecun_normal()
        up = nnx.with_partitioning(init, ("data", "model"))
        down = nnx.with_partitioning(init, ("model", "data"))
        self.up = nnx.Linear(D, 16, kernel_init=up, rngs=rngs)
        self.down = nnx.Linear(16, D, kernel_init=down, rngs=rngs)

    def __call__(self, x):
        spec = P(*[*jax.typeof(x).sharding.spec[:-1], "model"])
        explicit = jax.typeof(x).sharding.mesh.are_all_axes_explicit
        hidden = self.up(x, out_sharding=spec) if explicit else self.up(x)
        spec = P(*[*jax.typeof(x).sharding.spec[:-1], None])
        out = jnp.tanh(hidden)
        return x + (self.down(out, out_sharding=spec) if explicit else self.down(out))


class Stack(nnx.Module):
    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        def make(rngs):
            return Block(rngs=rngs)

        self.blocks = make(rngs)

    def __call__(self, x):
        @nnx.scan(
            in_axes=(nnx.Carry, 0), out_axes=nnx.Carry,
            transform_metadata={nnx.PARTITION_NAME: None},
        )  # fmt: skip
        def run(x, block):
            return block(x)

        return run(x, self.blocks)


def mesh(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def specs(model):
    state = nnx.get_partition_spec(nnx.state(model))
    return {"/".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(state)}


def make(kind):
    return (Block if kind == "block" else Stack)(rngs=nnx.Rngs(0))


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("kind", ["block", "stack"])
def test_scales_take_their_sharding_from_the_kernel(kind, axes):
    with jax.set_mesh(mesh(axes)):
        model = inject(make(kind), CONFIG, data_axes=())
        found = specs(model)
    at, stack = ("", ()) if kind == "block" else ("blocks/", (None,))
    # Each gamma is as long as the small side, which is the input of `up` and the output of `down`.
    assert found[f"{at}up/randlora_gamma"] == P(*stack, None, "data")
    assert found[f"{at}down/randlora_gamma"] == P(*stack, None, "data")
    assert found[f"{at}up/randlora_lambda"] == P(*stack, None, None)
    assert found["randlora_B"] == P(None, None, None)
    part = model.up if kind == "block" else model.blocks.up
    assert part.randlora_gamma[...].sharding.spec == P(*stack, None, "data")
    assert len(model.randlora_B[...].sharding.device_set) == 8


def test_several_axes_of_a_kernel_are_one_of_gamma():
    def gamma(names, inputs, outputs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
        with jax.set_mesh(mesh(AxisType.Auto)):
            layer = nnx.LinearGeneral(inputs, outputs, axis=tuple(range(-len(inputs), 0)),
                                      kernel_init=init, rngs=nnx.Rngs(0))  # fmt: skip
            return specs(inject(layer, CONFIG, data_axes=()))["randlora_gamma"]

    assert gamma((None, "model", None), (16,), (2, 4)) == P(None, "model")
    assert gamma((None, None, "model"), (16,), (2, 4)) == P(None, None)
    assert gamma(("data", None, "model"), (4, 2), (16,)) == P(None, "data")


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("kind", ["block", "stack"])
def test_numbers_are_those_of_one_device(kind, axes):
    value = jnp.asarray(np.random.default_rng(0).standard_normal((8, D)), jnp.float32)

    place = lambda new, old: jax.device_put(new, old.sharding)

    def loss(model, x):
        y = model(x)
        return jnp.sum(jnp.sin(y)), y

    @nnx.jit
    def both(model, x):
        wrt = nnx.DiffState(0, RandLoraParam)
        (_, y), grads = nnx.value_and_grad(loss, argnums=wrt, has_aux=True)(model, x)
        return {
            "y": y,
            **{"/".join(map(str, p)): g.get_value() for p, g in nnx.to_flat_state(grads)},
        }

    with jax.set_mesh(jax.make_mesh((1, 1), ("data", "model"), axis_types=(axes,) * 2)):
        alone = inject(make(kind), CONFIG, data_axes=())
        values = jax.tree.map(np.asarray, variables(alone))
        values["randlora"] = randomised(values["randlora"])
        update(alone, jax.tree.map(place, values, variables(alone)))
        expected = jax.tree.map(np.asarray, both(alone, jax.device_put(value, P("data", None))))
    with jax.set_mesh(mesh(axes)):
        model = inject(make(kind), CONFIG, data_axes=())
        update(model, jax.tree.map(place, values, variables(model)))
        x = jax.device_put(value, P("data", None))
        found = both(model, x)
        assert_close(jax.tree.map(np.asarray, found), expected, 1e-4)
        for path, spec in specs(nnx.state(model, RandLoraParam)).items():
            wanted = NamedSharding(jax.sharding.get_mesh(), spec)
            assert found[path].sharding.is_equivalent_to(wanted, found[path].ndim), path
        if kind == "block":
            assert_close(np.asarray(model(x)), expected["y"], 1e-4)  # without jit
        part = model.up if kind == "block" else model.blocks.up
        before = part.kernel[...].sharding
        merge(model)
        assert part.kernel[...].sharding == before
        assert_close(np.asarray(nnx.jit(lambda m, x: m(x))(model, x)), expected["y"], 1e-4)


def test_injection_under_jit_on_a_mesh_makes_only_parts():
    with jax.set_mesh(mesh(AxisType.Auto)):
        model = nnx.jit(lambda: inject(Block(rngs=nnx.Rngs(0)), CONFIG, data_axes=()))()
        assert model.up.randlora_gamma[...].sharding.spec == P(None, "data")
        x = jax.device_put(jnp.ones((8, D)), P("data", None))
        np.testing.assert_array_equal(
            model(x), inject(Block(rngs=nnx.Rngs(0)), CONFIG, data_axes=())(x)
        )


def test_an_abstract_model_has_the_shardings():
    graphdef, state = nnx.get_abstract_model(
        lambda: inject(Block(rngs=nnx.Rngs(0)), CONFIG, data_axes=()), mesh(AxisType.Auto)
    )
    assert state["up"]["randlora_gamma"].get_value().sharding.spec == P(None, "data")
    assert state["randlora_A"].get_value().sharding.spec == P(None, None, None)
    assert isinstance(nnx.merge(graphdef, state).up, nnx.Linear)
