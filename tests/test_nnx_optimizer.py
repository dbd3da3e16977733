"""NNX's optimizer moves what trains, and nothing else."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from randlora_jax.nnx import RandLoraParam, inject, trainable
from tests.nnx_models import CONFIG, MLP, x
from tests.test_nnx_transforms import MODELS, leaves, loss


@pytest.mark.parametrize("name", ["list", "stack", "remat"])
def test_the_optimizer_trains_scales_alone(name):
    model, value = inject(MODELS[name](), CONFIG), x()
    before = leaves(nnx.state(model))
    optimizer = nnx.Optimizer(model, optax.sgd(1e-2, momentum=0.9), wrt=RandLoraParam)
    state = [v for v in jax.tree.leaves(nnx.state(optimizer)) if np.ndim(v)]
    assert sum(map(np.size, state)) == sum(
        np.size(v) for k, v in before.items() if "randlora_lambda" in k or "randlora_gamma" in k
    )

    @nnx.jit
    def step(model, optimizer, x):
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, RandLoraParam))(model, x)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer, value)) for _ in range(20)]
    assert losses[-1] < losses[0] - 0.1
    for path, array in leaves(nnx.state(model)).items():
        changed = bool((array != before[path]).any())
        assert changed == ("randlora_lambda" in path or "randlora_gamma" in path), path


def test_the_optimizer_trains_biases_too_where_the_config_says_so():
    model = inject(MLP(rngs=nnx.Rngs(0)), CONFIG.replace(bias="all"))
    before = leaves(nnx.state(model))
    wrt = trainable(model)
    optimizer = nnx.Optimizer(model, optax.sgd(1e-2), wrt=wrt)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model, x())
        optimizer.update(model, grads)

    step(model, optimizer)
    step(model, optimizer)
    changed = {k for k, v in leaves(nnx.state(model)).items() if (v != before[k]).any()}
    assert changed == {k for k in before if k.split("/")[-1] in (
        "bias", "randlora_lambda", "randlora_gamma",
    )}  # fmt: skip
