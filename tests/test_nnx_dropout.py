"""Dropout of the adapter's input in NNX models."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax.nnx import inject
from tests.nnx_cases import CASES, Gated
from tests.nnx_models import CONFIG, MLP, D, assert_close, trained, x


@pytest.mark.parametrize("name", ["linear", "einsum", "own_einsum"])
def test_dropout_acts_on_the_adapter_s_input_alone(name):
    make, _, shape = CASES[name]
    config = CONFIG.replace(randlora_dropout=0.5)
    model = trained(make(), config, rngs=nnx.Rngs(dropout=1))
    plain = trained(make(), CONFIG)
    value = x(0, *shape)
    first, second = model(value), model(value)
    assert bool((first != second).any())  # the stream moves on
    model.eval()
    assert_close(np.asarray(model(value)), np.asarray(plain(value)), 1e-6)
    model.train()
    assert bool((model(value) != plain(value)).any())
    seen = nnx.view(model, deterministic=True)
    np.testing.assert_array_equal(seen(value), seen(value))


def test_dropout_without_a_stream_says_how_to_give_one():
    model = trained(MLP(rngs=nnx.Rngs(0)), CONFIG.replace(randlora_dropout=0.5))
    message = r"randlora_dropout=0\.5 has nothing to draw from: inject\(model, config, rngs=nnx"
    with pytest.raises(ValueError, match=message):
        model(x())
    model.eval()
    assert_close(np.asarray(model(x())), np.asarray(trained(MLP(rngs=nnx.Rngs(0)))(x())), 1e-6)


def test_dropout_s_mean_is_the_output_without():
    model = trained(
        nnx.Linear(D, 4, rngs=nnx.Rngs(0)),
        CONFIG.replace(randlora_dropout=0.5),
        rngs=nnx.Rngs(dropout=1),
    )
    value = jnp.broadcast_to(x(0, 1, D), (20000, D))
    mean = model(value).mean(0)
    model.eval()
    assert_close(np.asarray(mean), np.asarray(model(value)[0]), 0.05)


def test_untrained_dropout_changes_nothing():
    config = CONFIG.replace(randlora_dropout=0.5)
    model = inject(MLP(rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model(x()), MLP(rngs=nnx.Rngs(0))(x()))


def test_a_missing_stream_for_dropout_changes_nothing():
    model = MLP(rngs=nnx.Rngs(0))
    graphdef = nnx.graphdef(model)
    with pytest.raises(ValueError, match=r"rngs has no stream.*nnx\.Rngs\(dropout=0\)"):
        inject(model, CONFIG.replace(randlora_dropout=0.5), rngs=nnx.Rngs(params=0))
    assert nnx.graphdef(model) == graphdef


def test_dropout_on_a_raw_parameter_is_refused():
    config = CONFIG.replace(target_modules=["gating"], randlora_dropout=0.5)
    model = inject(Gated(rngs=nnx.Rngs(0)), config, parameters={"gating": (2,)}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"raw parameter 'Gated\.gating'"):
        model(x())
