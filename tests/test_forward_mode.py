"""Forward mode: an adapted model names the way out, and merged kernels are that way."""

import traceback

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import randlora_jax as rl
from randlora_jax import nnx as rx
from randlora_jax.linen import RandLora
from tests.linen_cases import assert_close, randomised
from tests.refused_models import ALL, Model, NnxModel, X

CONFIG = rl.RandLoraConfig(**ALL, exclude_modules=["scale"])


def linen():
    """Functions of scales: of the adapted model, and of the base on merged kernels."""
    model = RandLora(Model(), CONFIG)
    variables = model.adapt(Model().init(jax.random.key(0), X), X)
    whole = lambda scales: {**variables, "randlora": scales}
    merged = lambda s: Model().apply({"params": model.merge(whole(s))}, X)
    return lambda s: model.apply(whole(s), X), merged, randomised(variables["randlora"])


def in_place():
    model = rx.inject(NnxModel(), CONFIG)
    graphdef, scales, rest = nnx.split(model, rx.RandLoraParam, ...)
    whole = lambda scales: nnx.merge(graphdef, scales, rest, copy=True)
    scales = jax.tree.map(lambda a: a + 0.1, scales)
    return lambda s: whole(s)(X), lambda s: rx.merge(whole(s))(X), scales


FRONT_ENDS = pytest.mark.parametrize("make", [linen, in_place])
WAYS = {
    "jvp": lambda f, s: jax.jvp(f, (s,), (s,))[1],
    "jvp under jit": lambda f, s: jax.jit(lambda s: jax.jvp(f, (s,), (s,))[1])(s),
    "jvp of jit": lambda f, s: jax.jvp(jax.jit(f), (s,), (s,))[1],
    "jacfwd": lambda f, s: jax.jacfwd(lambda t: f(jax.tree.map(lambda a: a * t, s)))(jnp.ones(())),
}


@FRONT_ENDS
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_way_out_is_shown_and_is_one(make, way):
    adapted, merged, scales = make()
    with pytest.raises(TypeError, match=r"forward-mode .*custom_vjp") as caught:
        way(adapted, scales)
    assert "use merged kernels, as in README" in "".join(traceback.format_exception(caught.value))
    y, pull = jax.vjp(adapted, scales)
    pushed = way(merged, scales)
    # <dy, J s> is <J^T dy, s>, and the second is what reverse mode gives.
    back = jax.tree.map(lambda a, b: jnp.sum(a * b), pull(y)[0], scales)
    assert_close(jnp.sum(y * pushed), sum(jax.tree.leaves(back)), 1e-4)
