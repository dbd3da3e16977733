"""Kernels that are stacks of experts themselves, in NNX; more layers are in `nnx_cases`."""

import jax
import numpy as np
import pytest
from flax import nnx

import randlora_jax as rl
from randlora_jax import nnx as rx
from tests.expert_models import EQUATIONS, EXPERTS, WAYS, D, F, NnxRaw, NnxRegistered, NnxScanned
from tests.linen_cases import assert_close, normal
from tests.nnx_models import CONFIG, in_float64, trained

X = normal(0, EXPERTS, 5, D)
BOTH = {"gate": ((1,), (), (0,)), "out": ((1,), (), (0,))}
STACKED = {f"layers/{name}": (i, (0,), e) for name, (i, _, e) in BOTH.items()}
BY_PATH = CONFIG.replace(target_modules=["gate", "out"])
# name: (how the base is made, its kernels, the config, raw parameters)
CASES = {
    **{
        f"raw, by {way}": (lambda way=way: NnxRaw(way, rngs=nnx.Rngs(0)), BOTH, BY_PATH, EQUATIONS)
        for way in WAYS
    },
    "registered": (lambda: NnxRegistered("ragged_dot", rngs=nnx.Rngs(0)), BOTH, CONFIG, {}),
    "scanned": (lambda: NnxScanned(rngs=nnx.Rngs(0)), STACKED, CONFIG, {}),
    "scanned, raw": (
        lambda: NnxScanned(NnxRaw, rngs=nnx.Rngs(0)), STACKED, BY_PATH,
        {f"layers.{name}": equation for name, equation in EQUATIONS.items()},
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    make, kernels, config, parameters = CASES[request.param]
    return make, kernels, config, lambda: trained(make(), config, parameters=parameters)


def test_it_starts_with_the_base_s_bits_and_computes_with_the_updates(case):
    make, kernels, config, adapt = case
    parameters = {k: v for k, v in EQUATIONS.items()} if config is BY_PATH else {}
    base = make()
    if kernels is STACKED:
        parameters = {f"layers.{name}": equation for name, equation in parameters.items()}
    injected = rx.inject(make(), config, parameters=parameters)
    np.testing.assert_array_equal(injected(X), base(X))
    model = adapt()
    expected = in_float64(make, model, kernels, lambda m, x: m(x), X)
    assert np.abs(expected - np.asarray(base(X))).max() > 1e-2
    assert_close(np.asarray(model(X), np.float64), expected, 2e-5)
    assert_close(np.asarray(rx.merge(model)(X), np.float64), expected, 2e-5)


def test_a_loaded_adapter_needs_no_parameters(case, tmp_path):
    make, _, config, adapt = case
    model = adapt()
    y = model(X)
    rl.save_adapter(tmp_path / "a", rx.variables(model), config)
    other = make()
    rx.load_adapter(tmp_path / "a", other)
    np.testing.assert_array_equal(other(X), y)


def test_gradients_are_those_of_the_merged_model(case):
    _, _, _, adapt = case
    graphdef, scales, rest = nnx.split(adapt(), rx.RandLoraParam, ...)

    def loss(scales, change):
        model = change(nnx.merge(graphdef, scales, rest, copy=True))
        return (model(X) ** 2).sum()

    gradients = lambda change: jax.tree.map(
        np.asarray, nnx.to_pure_dict(jax.jit(jax.grad(lambda s: loss(s, change)))(scales))
    )
    assert_close(gradients(lambda m: m), gradients(lambda m: rx.merge(m, safe=False)), 1e-4)


@pytest.mark.parametrize("name", ["einsum", "general"])
def test_dropout_leaves_the_mean_of_the_updates(name):
    make = {
        "einsum": lambda: nnx.Einsum(EQUATIONS["gate"], (EXPERTS, D, F), rngs=nnx.Rngs(0)),
        "general": lambda: nnx.LinearGeneral(D, F, batch_axis={0: EXPERTS}, rngs=nnx.Rngs(0)),
    }[name]
    model = trained(make(), CONFIG.replace(randlora_dropout=0.5), rngs=nnx.Rngs(dropout=0))
    drawn = np.mean([model(X) for _ in range(300)], axis=0)
    assert not np.array_equal(model(X), model(X))
    model.eval()
    base = np.asarray(make()(X))
    assert_close(drawn - base, np.asarray(model(X)) - base, 0.25)


def test_adapters_by_name_on_experts():
    make = lambda: nnx.Einsum(EQUATIONS["gate"], (EXPERTS, D, F), rngs=nnx.Rngs(0))
    model = trained(make(), {"a": CONFIG, "b": CONFIG.replace(randlora_alpha=4.0)})
    both, base = model(X), make()(X)
    rx.set_active(model, ("a",))
    one = model(X)
    rx.set_active(model, ("b",))
    assert_close(np.asarray(one + model(X) - base), np.asarray(both), 1e-5)
    rx.delete(model, "b")
    assert_close(np.asarray(model(X)), np.asarray(base), 1e-6)  # "b" was the active one
    rx.set_active(model, ("a",))
    assert_close(np.asarray(rx.merge(model)(X)), np.asarray(one), 1e-5)
