"""MaxText's own layers, unmodified and not registered: its DenseGeneral, and its experts."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from maxtext.configs import pyconfig
from maxtext.layers import initializers, linears, moe

import randlora_jax as rl
from randlora_jax.nnx import RandLoraParam, inject, load_adapter, merge, update, variables
from tests.linen_cases import normal, randomised

CONFIG = rl.RandLoraConfig(r=3, randlora_alpha=4.0, target_modules="all-linear")
D, F, EXPERTS = 8, 12, 4


def config(**changes):
    """MaxText's own, as small as can be."""
    base = importlib.util.find_spec("maxtext.configs").submodule_search_locations[0]
    options = dict(
        run_name="test", enable_checkpointing=False, base_emb_dim=D, base_moe_mlp_dim=F,
        base_mlp_dim=F, dtype="float32", weight_dtype="float32", num_experts=EXPERTS,
        num_experts_per_tok=2, megablox=False, sparse_matmul=False, max_target_length=16,
        per_device_batch_size=1, skip_jax_distributed_system=True, log_config=False,
    )  # fmt: skip
    return pyconfig.initialize([None, os.path.join(base, "base.yml")], **options | changes)


def mesh(settings):
    shape = [1] * len(settings.mesh_axes)
    return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(shape), settings.mesh_axes)


def experts(**changes):
    settings = config(**changes)
    return moe.RoutedMoE(
        config=settings, num_experts=EXPERTS, num_experts_per_tok=2, mesh=mesh(settings),
        kernel_init=initializers.nd_dense_init(1.0, "fan_in", "truncated_normal"),
        kernel_axes=("embed", None), intermediate_dim=F, rngs=nnx.Rngs(0),
    )  # fmt: skip


class Stack(nnx.Module):
    """Three layers of MaxText's, stacked and scanned."""

    def __init__(self):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return linears.DenseGeneral(D, D, rngs=rngs)

        self.layers = make(nnx.Rngs(0))

    def __call__(self, x):
        run = lambda x, layer: x + layer(x)
        return nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


X = normal(0, 2, 5, D)
# name: (how it is made, its input, its kernels)
CASES = {
    "dense": (lambda: linears.DenseGeneral(D, F, use_bias=True, rngs=nnx.Rngs(0)), X, {""}),
    "few tokens": (lambda: linears.DenseGeneral(D, F, rngs=nnx.Rngs(0)), X[:1, :1], {""}),
    "heads": (
        lambda: linears.DenseGeneral((2, D), (3, 5), axis=(-2, -1), rngs=nnx.Rngs(0)),
        normal(0, 4, 2, D),
        {""},
    ),
    "axes apart": (
        lambda: linears.DenseGeneral((4, D), 5, axis=(0, 2), rngs=nnx.Rngs(0)),
        normal(0, 4, 2, D),
        {""},
    ),
    "stack": (Stack, X, {"layers"}),
    "experts": (experts, X, {"gate", "wi_0[0;1]", "wi_1[0;1]", "wo[0;1]"}),
    "experts, in one kernel": (
        lambda: experts(prefuse_moe_weights=True), X, {"gate", "wi[0;1]", "wo[0;1]"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_adapted_trains_and_merges(case, tmp_path):
    make, x, names = CASES[case]
    of = lambda y: y[0] if isinstance(y, tuple) else y
    base, model = make(), inject(make(), CONFIG)
    found = {"/".join(path[:-1]) for path, _ in rl.trees.items(variables(model)["randlora"])}
    assert found == names
    np.testing.assert_array_equal(of(model(x)), of(base(x)))
    values = variables(model)
    update(model, {**values, "randlora": randomised(values["randlora"])})
    loss = lambda model: jnp.sum(of(model(x)) ** 2)
    gradients = nnx.grad(loss, argnums=nnx.DiffState(0, RandLoraParam))(model)
    for path, gradient in nnx.to_flat_state(gradients):
        value = np.asarray(gradient.get_value())
        assert np.isfinite(value).all() and np.abs(value).max() > 0, path
    y = np.asarray(of(model(x)))
    assert np.abs(y - of(base(x))).max() > 1e-2 * np.abs(y).max()
    rl.save_adapter(tmp_path / "adapter", variables(model), CONFIG)
    other = make()
    load_adapter(tmp_path / "adapter", other)
    np.testing.assert_array_equal(of(other(x)), y)
    merge(model)
    np.testing.assert_allclose(of(model(x)), y, atol=1e-4 * np.abs(y).max())
    assert type(model) is type(base)
