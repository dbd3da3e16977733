"""What NNX models cannot do is refused, and nothing is changed by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import register_layer
from randlora_jax.nnx import inject, lending, merge, update, variables
from tests.nnx_models import CONFIG, MLP, Block, D, Stack, trained, unchanged_if_it_fails, x


def test_a_kernel_that_two_modules_hold_is_refused():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)
            self.b.kernel = self.a.kernel

    with pytest.raises(ValueError, match="the 'kernel' of 'a' is that of another module too"):
        inject(Tied(nnx.Rngs(0)), CONFIG)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (
            lambda: MLP(rngs=nnx.Rngs(0)),
            {"target_modules": ["upp"]},
            r"'upp' matches no module.*up",
        ),
        (lambda: MLP(rngs=nnx.Rngs(0)), {"target_modules": ["layers.0"]}, "is a Block and not"),
        (lambda: MLP(rngs=nnx.Rngs(0)), {"target_modules": None}, "target_modules is None"),
        (
            lambda: MLP(rngs=nnx.Rngs(0)),
            {"target_modules": ["head"], "exclude_modules": ["head"]},
            "leaves no linear layer",
        ),
        (
            lambda: Stack(rngs=nnx.Rngs(0)),
            {"target_modules": ["up"], "layers_to_transform": 3},
            "does not fit the stack",
        ),
        (
            lambda: Stack(axis=1, rngs=nnx.Rngs(0)),
            {"target_modules": ["up"], "layers_to_transform": 1},
            "counts layers along the first axis",
        ),
        (
            lambda: nnx.Einsum("ni,ni->n", (5, D), rngs=nnx.Rngs(0)),
            {},
            "no linear map by one kernel",
        ),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_changed(make, changes, message):
    model = make()
    with pytest.raises(ValueError, match=message), unchanged_if_it_fails(model):
        inject(model, CONFIG.replace(**changes))


def test_a_second_injection_is_refused():
    model = inject(MLP(rngs=nnx.Rngs(0)), CONFIG)
    with pytest.raises(ValueError, match="injected already: merge or remove"):
        inject(model, CONFIG)
    with pytest.raises(ValueError, match="has no adapter"):
        merge(MLP(rngs=nnx.Rngs(0)))


def test_an_equation_unknown_until_the_call_is_refused():
    class Late(nnx.Module):
        def __init__(self, shape, rngs):
            self.w = nnx.Param(rngs.normal(shape))

        def __call__(self, equation, x):
            return jnp.einsum(equation, x, self.w[...])

    register_layer(Late, kernel="w")
    with pytest.raises(ValueError, match="give register_layer its input_axes"):
        inject(Late((4, D, 3), nnx.Rngs(0)), CONFIG)
    model = trained(Late((D, 3), nnx.Rngs(0)))
    model("bi,io->bo", x())
    with pytest.raises(ValueError, match="the call's equation"):
        model("bi,oi->bo", x(0, 5, 3))


def test_merging_refuses_numbers_that_are_not_finite():
    model = trained(MLP(rngs=nnx.Rngs(0)))
    model.layers[1].up.randlora_lambda[...] = jnp.full((3, 2), jnp.nan)
    before = jax.tree.map(np.asarray, nnx.state(model))
    with pytest.raises(ValueError, match=r"'layers.1.up' gives numbers that are not finite"):
        merge(model)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    assert not bool(jnp.isfinite(merge(model, safe=False)(x())).all())


def test_updating_with_another_model_s_scales_is_refused():
    model = trained(MLP(rngs=nnx.Rngs(0)))
    other = variables(inject(MLP(3, rngs=nnx.Rngs(0)), CONFIG))
    before = model(x())
    with pytest.raises(ValueError, match=r"'layers.2.down.randlora_gamma'.*another model"):
        update(model, other)
    np.testing.assert_array_equal(model(x()), before)
    with pytest.raises(ValueError, match="another model"):
        inject(Block(rngs=nnx.Rngs(0)), CONFIG, values=other)


def test_an_old_flax_is_refused_where_it_loses_gradients(monkeypatch):
    monkeypatch.setattr(lending, "FLAX", (0, 12, 6))
    model = trained(Stack(rngs=nnx.Rngs(0)))
    with nnx.set_graph_mode(False), pytest.raises(RuntimeError, match=r"install flax>=0\.12\.7"):
        model(x())
    with nnx.set_graph_mode(False):
        trained(MLP(rngs=nnx.Rngs(0)))(x())
    model(x())
