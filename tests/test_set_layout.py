"""Telling a model of its layout: abstract, pickled, on another mesh, and what is refused."""

import pickle

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from randlora_jax.linen import RandLora
from randlora_jax.nnx import (
    inject,
    set_layout,
)
from tests.placing import CONFIG, X, linen_variables, mesh, nnx_linear, put


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
