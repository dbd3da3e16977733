"""Ways to call an injected NNX model: its parts, its other methods, threads, calls that fail."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax.nnx import lend_bases, merge
from tests.nnx_cases import Loud, Own
from tests.nnx_models import CONFIG, MLP, D, assert_close, trained, x


def test_arguments_of_the_call_pass_through():
    model = trained(Loud(D, 8, rngs=nnx.Rngs(0)))
    assert bool((model(x(), gain=2.0) == model(2 * x())).all())


def test_other_methods_of_model_and_layer_are_adapted():
    model = trained(MLP(rngs=nnx.Rngs(0)))
    y = model.features(x())
    layer = trained(Own(D, 8, use_bias=False, rngs=nnx.Rngs(0)))
    z = layer.transposed(x(1, 5, 8))
    assert_close(np.asarray(merge(model).features(x())), np.asarray(y), 1e-5)
    assert_close(np.asarray(merge(layer).transposed(x(1, 5, 8))), np.asarray(z), 1e-5)


def test_a_copy_of_a_part_is_refused_or_lent_the_bases():
    model, call = trained(MLP(rngs=nnx.Rngs(0))), nnx.jit(lambda part, x: part(x))
    with pytest.raises(RuntimeError, match=r"Linear was called outside of its model.*lend_bases"):
        call(model.layers[0], x())
    with lend_bases(model):
        y = call(model.layers[0], x())
    with pytest.raises(RuntimeError, match="outside"):
        call(model.layers[0], x())
    assert_close(np.asarray(model.layers[0](x())), np.asarray(y), 1e-5)
    merge(model)
    assert_close(np.asarray(model.layers[0](x())), np.asarray(y), 1e-5)


def test_a_failed_call_takes_the_bases_back():
    model = trained(MLP(rngs=nnx.Rngs(0)))
    graphdef = nnx.graphdef(model)
    with pytest.raises(TypeError):
        model(x(0, 5, 7))
    assert nnx.graphdef(model) == graphdef


def test_a_call_in_another_thread_does_not_take_them_away():
    class Slow(MLP):
        def __call__(self, x):
            y = self.features(x)
            inside.wait()
            done.wait()
            return self.head(y)

    model = trained(Slow(rngs=nnx.Rngs(0)))
    inside, done, results = threading.Event(), threading.Event(), []
    thread = threading.Thread(target=lambda: results.append(model(x())))
    thread.start()
    inside.set()
    model.features(x())
    done.set()
    thread.join()
    expected = merge(model)(x())
    assert_close(np.asarray(results[0]), np.asarray(expected), 1e-5)


def test_an_injected_part_of_an_injected_whole_keeps_its_own_bases():
    outer = MLP(rngs=nnx.Rngs(0))
    trained(outer.layers[1], CONFIG.replace(projection_prng_key=5))
    y = outer(x())
    merge(outer.layers[1])
    assert_close(np.asarray(outer(x())), np.asarray(y), 1e-5)


def test_what_a_layer_stores_in_its_call_stays():
    class Counting(nnx.Linear):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.calls = nnx.Variable(jnp.zeros(()))

        def __call__(self, x):
            self.calls[...] += 1
            self.seen, self.last = x.shape, jnp.sum(x)
            return super().__call__(x)

    model = trained(Counting(D, 4, rngs=nnx.Rngs(0)))
    model(x())
    assert float(model.calls[...]) == 1 and model.seen == (5, D)
    assert "last" in nnx.state(model)  # an array, and known as one
