"""What is left out of models with stacks and bridges, and what the warning says to do about it."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import randlora_jax as rl
from randlora_jax import nnx as rx
from randlora_jax.linen import RandLora
from tests.linen_cases import assert_close, randomised
from tests.nnx_models import trained
from tests.test_left_out import ALL, INIT, D, NnxEverything, X, not_adapted, of_linen, of_nnx


class OwnNorm(nn.Module):
    """A norm that Flax does not know."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (D,))
        return x * jnp.broadcast_to(scale, x.shape)


class Inner(nn.Module):
    linear: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        x = OwnNorm(name="norm")(x)
        x = nn.Dense(D, name="up")(x) if self.linear else x
        return jnp.einsum("bd,edf->bf", x, self.param("experts", INIT, (3, D, D))), None


def scanned(cls, length, *args, name=None):
    options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    return nn.scan(cls, length=length, **options)(*args, name=name)


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x, _ = scanned(Inner, 3, name="inner")(OwnNorm(name="outer_norm")(x), None)
        return x, None


class Holds(nn.Module):
    """A stack, and beside it a raw kernel as long as the stack is high."""

    linear: bool = True

    @nn.compact
    def __call__(self, x):
        x, _ = scanned(Inner, 3, self.linear, name="layers")(x, None)
        x = x + jnp.sum(self.param("raw", INIT, (3, D)), 0, keepdims=True)
        return nn.Dense(D, name="head")(x)


class Model(nn.Module):
    linear: bool = True

    @nn.compact
    def __call__(self, x):
        return Holds(self.linear, name="model")(x)


class Ensemble(nn.Module):
    """Whose root is itself a stack."""

    @nn.compact
    def __call__(self, x):
        return scanned(Inner, 3)(x, None)[0]


LEFT_OUT = {
    "nested": (scanned(Nested, 2), (X, None), ["inner.experts (3, 5, 5)"]),
    "beside a raw kernel": (Model(), (X,), ["model.layers.experts (3, 5, 5)", "model.raw (3, 5)"]),
    "at the root": (scanned(Inner, 3), (X, None), ["experts (3, 5, 5)"]),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_shapes_are_those_of_one_layer(name):
    base, args, expected = LEFT_OUT[name]
    params = base.init(jax.random.key(0), *args)["params"]
    with pytest.warns(UserWarning, match="leaves out") as caught:
        variables = RandLora(base, ALL).adapt({"params": params}, *args)
    listed = str(caught[0].message).split("leaves out: ")[1].split(". If they")[0]
    assert sorted(listed.split("; ")) == expected
    assert sorted(not_adapted(variables, ALL)) == expected


def test_a_stack_in_which_nothing_is_adapted():
    base = Model(linear=False)
    params = base.init(jax.random.key(0), X)["params"]
    with pytest.warns(UserWarning, match="leaves out") as caught:
        RandLora(base, ALL).adapt({"params": params}, X)
    listed = str(caught[0].message).split("leaves out: ")[1].split(". If they")[0]
    assert sorted(listed.split("; ")) == ["model.layers.experts (3, 5, 5)", "model.raw (3, 5)"]


def test_every_adapter_that_means_everything_is_asked():
    some = ALL.replace(exclude_modules=["experts", "renamed", "raw", "bridge"])
    for adapt in (of_linen, of_nnx):
        _, caught = adapt({"a": some, "b": ALL})
        assert "experts.wi" in str(caught[0].message)


def test_each_is_told_the_way_that_works_for_it():
    (message,) = (str(one.message) for one in of_linen(ALL)[1] if "leaves" in str(one.message))
    assert "adapt the module within the ToLinen, by RandLora or inject" in message
    assert "ToLinen, kernel" not in message and "Experts, kernel" not in message  # it has two
    assert "experts.wi': (...)}" in message


def test_the_cure_of_the_warning_works():
    class Unknown(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("weight", INIT, (D, D))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(D)(Unknown(name="unknown")(x))

    base = Model().init(jax.random.key(0), X)
    with pytest.warns(
        UserWarning, match=r"kernels: randlora_jax.register_layer\(Unknown, kernel='weight'\)\."
    ):
        RandLora(Model(), ALL).adapt(base, X)
    rl.register_layer(Unknown, kernel="weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variables = RandLora(Model(), ALL).adapt(base, X)
    assert not_adapted(variables, ALL) == []


def test_layers_that_do_not_run_are_told_of():
    class Two(nn.Module):
        def setup(self):
            self.one, self.other = nn.Dense(D), nn.Dense(D)

        def __call__(self, x):
            return self.one(x) if not self.is_initializing() else self.other(self.one(x))

        def second(self, x):
            return self.other(x)

    class Calls(nn.Module):
        def setup(self):
            self.two = Two()

        def __call__(self, x):
            return self.two.one(x)

    base = {"params": {"two": Two().init(jax.random.key(0), X)["params"]}}
    with pytest.warns(UserWarning, match=r"leaves out: two.other.kernel \(5, 5\)"):
        RandLora(Calls(), ALL).adapt(base, X)


def test_a_bridge_s_parameters_can_be_adapted_by_path_and_its_model_by_itself():
    config = ALL.replace(target_modules=["known"])
    for adapt in (of_linen, of_nnx):
        adapt(config, parameters={"bridge.kernel": (0,)})
    model = trained(NnxEverything(), config, parameters={"bridge.kernel": (0,)})
    y = model(X)
    assert_close(rx.merge(model)(X), y, 1e-5)

    inner = nnx.bridge.ToNNX(RandLora(nn.Dense(D), ALL), rngs=nnx.Rngs(0)).lazy_init(X)
    scales = nnx.state(inner, rx.RandLoraParam)
    assert {path[-1] for path, _ in nnx.to_flat_state(scales)} == {
        "randlora_gamma",
        "randlora_lambda",
    }
    wrt = nnx.DiffState(0, rx.RandLoraParam)
    gradients = nnx.grad(lambda m: jnp.sum(m(X) ** 2), argnums=wrt)(inner)
    assert jnp.any(gradients["randlora_lambda"].get_value())
    assert type(inner.randlora_A) is rx.RandLoraBasis

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            make = lambda rngs: rx.inject(nnx.Linear(D, D, rngs=rngs), ALL)
            return nnx.bridge.ToLinen(make, name="inside")(x)

    variables = Outer().init(jax.random.key(0), X)
    trainable, _ = rl.split({**variables, "randlora": randomised(variables["randlora"])}, ALL)
    assert set(trainable) == {"randlora"}
    stronger = Outer().apply({**variables, **trainable}, X)
    with pytest.raises(ValueError, match=r"a part of another one.*\{name: tree\['inside'\]"):
        rl.merge({**variables, **trainable}, ALL)
    inside = {name: tree["inside"] for name, tree in {**variables, **trainable}.items()}
    plain = nnx.bridge.to_linen(nnx.Linear, D, D).apply({"params": rl.merge(inside, ALL)}, X)
    assert_close(stronger, plain, 1e-5)


def test_a_model_that_is_a_bridge_is_refused_with_a_cure():
    base = nnx.bridge.to_linen(nnx.Linear, D, D)
    params = base.init(jax.random.key(0), X)["params"]
    with pytest.raises(ValueError, match=r"adapt the module within the ToLinen"):
        RandLora(base, ALL).adapt({"params": params}, X)
    model = nnx.bridge.ToNNX(nn.Dense(D), rngs=nnx.Rngs(0)).lazy_init(X)
    with pytest.raises(ValueError, match=r"adapt the module within the ToNNX"):
        rx.inject(model, ALL)
