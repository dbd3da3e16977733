"""Ahead of time, on a mesh with automatic axes: exported, serialised, cached, lowered elsewhere.

The base can do all this. An adapted model can once it is told of its layout: then no callback of
the compiler is in it.
"""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import randlora_jax as rl
from randlora_jax.linen import RandLora
from randlora_jax.nnx import RandLoraParam, inject, set_layout
from randlora_jax.ops.costs import cheapest
from tests import ahead, pods

CALLBACK = "CustomSPMDPartitioning"


@pytest.fixture(scope="module")
def arrays():
    return ahead.arrays()


def test_another_process_finds_the_executable_and_calls_what_was_exported(arrays, tmp_path):
    mesh, variables, x = arrays
    functions = {s: ahead.loss(s, variables, x) for s in ahead.STRATEGIES}
    with jax.set_mesh(mesh):
        values = {s: float(f(variables, x)) for s, f in functions.items()}
        exported = export.export(functions["merged"])(variables, x)
    (tmp_path / "exported").write_bytes(exported.serialize())

    def run():
        command = [sys.executable, "-m", "tests.ahead", tmp_path / "cache", tmp_path / "exported"]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    first, second = run(), run()
    for strategy in ahead.STRATEGIES:
        assert [first[strategy][0], second[strategy][0]] == [False, True]
        # Each its own: the two ways differ in the last bits, and the cache must not mix them up.
        assert first[strategy][1] == second[strategy][1]
        assert first[strategy][1] == pytest.approx(values[strategy], rel=1e-5)
    assert first["exported"][1] == pytest.approx(values["merged"], rel=1e-5)


def test_an_executable_is_serialised(arrays):
    mesh, variables, x = arrays
    with jax.set_mesh(mesh):
        compiled = ahead.loss("auto", variables, x).lower(variables, x).compile()
        again = deserialize_and_load(*serialize(compiled))
        assert float(again(variables, x)) == float(compiled(variables, x))


def test_a_batch_may_be_a_symbol(arrays):
    mesh, variables, x = arrays
    model = RandLora(pods.Net(ahead.LAYOUT), ahead.CONFIG).with_layout(variables, x)
    (size,) = export.symbolic_shape("b", constraints=["mod(b, 4) == 0"])
    abstract = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)
    any_batch = jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=x.sharding)
    with jax.set_mesh(mesh):
        exported = export.export(jax.jit(model.apply))(jax.tree.map(abstract, variables), any_batch)
        for part in (x, x[:4]):
            value = jax.device_put(part, x.sharding)
            got, expected = jax.jit(exported.call)(variables, value), model.apply(variables, value)
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_symbol_is_computed_in_the_way_that_is_bounded():
    model = RandLora(pods.nn.Dense(8), ahead.CONFIG)
    variables = model.init(jax.random.key(0), jnp.ones((4, 8)))
    (size,) = export.symbolic_shape("b")
    assert cheapest(size, 8, 8, (2, 4)) == ("factored", "factored")
    x = jax.ShapeDtypeStruct((size, 8), jnp.float32)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    told = model.with_layout(variables, NamedSharding(mesh, P()))
    call = export.export(jax.jit(told.apply))(variables, x).call
    for tokens in (1, 64):
        value = jnp.ones((tokens, 8))
        np.testing.assert_allclose(call(variables, value), model.apply(variables, value), rtol=1e-5)


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_a_mesh_that_is_not_there(arrays, front_end):
    """For a TPU that this machine has not: every layer is divided, by no callback."""
    there, variables, x = arrays
    mesh = AbstractMesh(there.axis_sizes, there.axis_names, axis_types=there.axis_types)
    abstract = lambda a: jax.ShapeDtypeStruct(
        a.shape, a.dtype, sharding=NamedSharding(mesh, a.sharding.spec)
    )
    if front_end == "linen":
        variables, x = jax.tree.map(abstract, (variables, x))
        model = RandLora(pods.Net(ahead.LAYOUT), ahead.CONFIG).with_layout(variables, x)
        trainable, frozen = rl.split(variables, ahead.CONFIG)
        value = lambda t, f, x: pods.loss(model.apply(rl.combine(t, f), x))
        step, given = jax.grad(value), (trainable, frozen, x)
    else:
        with jax.set_mesh(there):
            model = inject(pods.NnxNet(ahead.LAYOUT, nnx.Rngs(0)), ahead.CONFIG)
            set_layout(model, x)
        graph, scales, rest = nnx.split(model, RandLoraParam, ...)
        value = lambda scales, rest, x: pods.loss(nnx.merge(graph, scales, rest)(x))
        step, given = jax.grad(value), jax.tree.map(abstract, (scales, rest, x))
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(step).trace(*given).lower(lowering_platforms=("tpu",))
    text = lowered.as_text()
    assert CALLBACK not in text
    # Four shapes of kernels, forward and backward: layers that are alike share a function.
    assert text.count("sdy.manual_computation") >= 4 * 2


def test_a_policy_of_rematerialisation_saves_products_of_adapted_layers(arrays):
    """With "dots_saveable" the backward pass runs no forward product again."""
    mesh, variables, x = arrays
    model = RandLora(pods.Net(pods.Layout({})), ahead.CONFIG)
    told = model.with_layout(variables, x)
    policies = jax.checkpoint_policies

    def flops(model, policy):
        run = jax.checkpoint(lambda v, x: pods.loss(jnp.sin(model.apply(v, x))), policy=policy)
        scales = lambda s, v, x: run({**v, "randlora": s}, x)
        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.grad(scales)).lower(variables["randlora"], variables, x)
            return compiled.compile().cost_analysis()["flops"]

    nothing, saved = (flops(told, p) for p in (policies.nothing_saveable, policies.dots_saveable))
    assert saved < 0.95 * nothing
