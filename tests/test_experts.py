"""Kernels that are stacks of experts themselves, in Linen: each expert has scales of its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import randlora_jax as rl
from randlora_jax import trees
from randlora_jax.linen import RandLora
from tests import linen_cases
from tests.compiling import shipped_jit
from tests.expert_models import (
    EQUATIONS,
    EXPERTS,
    WAYS,
    D,
    F,
    Moe,
    Raw,
    Registered,
    Scanned,
    SharedScope,
)
from tests.linen_cases import Case, R, assert_close, normal
from tests.linen_models import GemmaEinsum, PlainEinsum

X = normal(0, EXPERTS, 5, D)
BOTH = {"gate": ((1,), (), (0,)), "out": ((1,), (), (0,))}
MOE = {"gate/kernel": ((1,), (), (0,)), "out/kernel": ((1,), (), (0,))}
bias = nn.initializers.normal()
CASES = {
    "Einsum": Case(
        nn.Einsum((EXPERTS, D, F), EQUATIONS["gate"], bias_init=bias),
        (X,),
        {"kernel": ((1,), (), (0,))},
    ),
    "Einsum, few tokens": Case(
        nn.Einsum((EXPERTS, D, F), EQUATIONS["gate"], bias_init=bias),
        (X[:, :1],),
        {"kernel": ((1,), (), (0,))},
    ),
    "gemma's, with groups": Case(
        GemmaEinsum((EXPERTS, 2, F, D)),
        (X[None],),
        {"w": ((3,), (), (0,))},
        before=("gecd,ekfd->kgecf",),
    ),
    "plain, few tokens, in another order": Case(
        PlainEinsum((EXPERTS, 2, F, D)),
        (X[None, :, :1],),
        {"w": ((3,), (), (0,))},
        before=("gecd,ekfd->kgecf",),
    ),
    "experts in the middle": Case(
        PlainEinsum((D, EXPERTS, F)),
        (X[:, :1],),
        {"w": ((0,), (), (1,))},
        before=("ecd,def->ecf",),
    ),
    "experts last, and no one's first": Case(
        PlainEinsum((D, F, EXPERTS)),
        (normal(0, 5, EXPERTS, D),),
        {"w": ((0,), (), (2,))},
        before=("ced,dfe->cef",),
    ),
    "DenseGeneral": Case(
        nn.DenseGeneral((2, F), batch_dims=(0,), bias_init=bias), (X,), {"kernel": ((1,), (), (0,))}
    ),
    "DenseGeneral, several of all": Case(
        nn.DenseGeneral((3, 2), axis=(-2, -1), batch_dims=(0, 1)),
        (normal(0, 2, 3, 4, 5, D),),
        {"kernel": ((2, 3), (), (0, 1))},
    ),
    **{
        f"raw, by {way}": Case(Raw(way), (X,), BOTH, parameters=EQUATIONS, config={"r": 2})
        for way in WAYS
    },
    "two kernels of a registered class": Case(Registered("ragged_dot"), (X,), BOTH),
    "both in a model": Case(Moe(), (X,), MOE),
    "scanned": Case(Scanned(), (X,), {f"moe/{k}": (i, (0,), e) for k, (i, _, e) in MOE.items()}),
    "scanned, raw": Case(
        Scanned(Raw),
        (X,),
        {f"moe/{k}": (i, (0,), e) for k, (i, _, e) in BOTH.items()},
        parameters={f"moe.{k}": e for k, e in EQUATIONS.items()},
    ),
    "a scope that two layers share": Case(
        SharedScope(), (X,), {"gating_einsum": ((2,), ()), "linear": ((0,), ())}
    ),
}
RAW = [name for name in CASES if "raw" in name]
for name in RAW:
    CASES[name].config = {**CASES[name].config, "target_modules": ["gate", "out"]}

# For each case above.
test_the_base_has_the_paths_and_initial_values_of_the_unwrapped_model = (
    linen_cases.test_the_base_has_the_paths_and_initial_values_of_the_unwrapped_model
)
test_output_is_bit_identical_before_training = (
    linen_cases.test_output_is_bit_identical_before_training
)
test_output_is_that_of_kernel_plus_update = linen_cases.test_output_is_that_of_kernel_plus_update
test_gradients_are_those_of_kernel_plus_update = (
    linen_cases.test_gradients_are_those_of_kernel_plus_update
)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.mark.parametrize("strategy", ["auto", "merged", "factored"])
def test_merging_gives_the_same_output_by_every_strategy(case, strategy):
    y = case.model.clone(strategy=strategy).apply(case.trained, *case.args)
    assert_close(np.asarray(y, np.float64), case.expected[0], case.tolerance)
    # Labels say all: no example inputs.
    params = rl.merge(case.trained, case.model.config)
    merged = case.base.apply({"params": params}, *case.args)
    assert_close(np.asarray(merged, np.float64), case.expected[0], case.tolerance)


def test_an_adapter_restores_and_acts_whole(case, tmp_path):
    rl.save_adapter(tmp_path / "a", case.trained, case.model.config)
    loaded, config = rl.load_adapter(tmp_path / "a", {"params": case.trained["params"]})
    model = RandLora(case.base, config)  # without `parameters`: the labels tell
    y = model.apply(loaded, *case.args)
    assert_close(np.asarray(y, np.float64), case.expected[0], case.tolerance)


def test_each_expert_trains_by_itself():
    case = CASES["both in a model"]
    trainable, frozen = rl.split(case.trained, case.model.config)
    shapes = {"/".join(p): a.shape for p, a in trees.items(trainable["randlora"])}
    assert shapes["gate/kernel[0;1]/randlora_lambda"] == (EXPERTS, R, 2)
    assert shapes["gate/kernel[0;1]/randlora_gamma"] == (EXPERTS, 2, D)

    def loss(trainable):
        return jnp.sum(case.model.apply(rl.combine(trainable, frozen), X)[2] ** 2)

    for _, gradient in trees.items(jax.grad(loss)(trainable)["randlora"]):
        assert (jnp.abs(gradient).max((1, 2)) > 0).tolist() == [False, False, True, False]


def test_dropout_acts_on_what_each_expert_gets():
    base = Moe()
    config = rl.RandLoraConfig(r=R, target_modules="all-linear", randlora_dropout=0.5)
    model = RandLora(base, config)
    variables = model.adapt(base.init(jax.random.key(1), X), X)
    variables["randlora"] = linen_cases.randomised(variables["randlora"])
    run = lambda x, **o: model.apply(variables, x, rngs={"dropout": jax.random.key(3)}, **o)
    still, first = run(X, deterministic=True), run(X, deterministic=False)
    assert bool((first == run(X, deterministic=False)).all())
    changed = jnp.abs(first - still).max((1, 2)) > 1e-4
    assert changed.all() and bool(jnp.isfinite(first).all())
    one = RandLora(nn.Einsum((EXPERTS, D, F), EQUATIONS["gate"], use_bias=False), config)
    variables = one.init(jax.random.key(0), X)
    variables["randlora"] = linen_cases.randomised(variables["randlora"])
    base_y = one.base.apply({"params": variables["params"]}, X)
    update = one.apply(variables, X, deterministic=True) - base_y
    keys = jax.random.split(jax.random.key(5), 400)
    draw = lambda key: one.apply(variables, X, rngs={"dropout": key}, deterministic=False)
    mean = jnp.mean(jax.lax.map(draw, keys), 0) - base_y
    assert_close(np.asarray(mean), np.asarray(update), 0.25)


def test_several_kernels_of_one_layer_have_no_one_input_to_drop():
    config = rl.RandLoraConfig(r=R, target_modules="all-linear", randlora_dropout=0.5)
    model = RandLora(Registered(), config, deterministic=False)
    variables = model.adapt(Registered().init(jax.random.key(1), X), X)
    with pytest.raises(ValueError, match=r"randlora_dropout=0.5 has no input to act on"):
        model.apply(variables, X, rngs={"dropout": jax.random.key(0)})


@pytest.mark.parametrize("tokens", [1, 8, 512])
def test_operations_are_those_of_the_cheaper_formula(tokens):
    from randlora_jax.ops.costs import product_flops

    x = jax.ShapeDtypeStruct((EXPERTS, tokens, 48), jnp.float32)
    base = nn.DenseGeneral(96, batch_dims=(0,), use_bias=False)
    config = rl.RandLoraConfig(r=8, target_modules="all-linear")
    model = RandLora(base, config)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    trainable, frozen = rl.split(variables, config)
    loss = lambda trainable, x, frozen: jnp.sum(model.apply(rl.combine(trainable, frozen), x))
    step = shipped_jit(jax.value_and_grad(loss, (0, 1)))
    flops = step.lower(trainable, x, frozen).compile().cost_analysis()["flops"]
    ways = [sum(product_flops(tokens, 48, 96, 48, way, way)) for way in ("merged", "factored")]
    assert flops <= 1.1 * EXPERTS * min(ways) + 60 * EXPERTS * 48 * 48


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"gate": "ecd,ef->ecf"}, r"'gate'.*'ecd,ef->ecf' is no linear map"),
        ({"gate": "ecd,edf->ecd"}, r"'gate'.*no linear map by one kernel"),
        ({"gate": "ecd,nedf->necf"}, r"'gate'.*no linear map by one kernel"),
        ({"gate": "cd,df->cf"}, r"'gate'.*whose axes are others than in 'cd,df->cf'"),
        ({"gate": (0, 1, 2)}, r"'gate'.*can't have the input axes"),
        ({"gate": (7,)}, r"'gate'.*can't have the input axes"),
    ],
)
def test_what_raw_experts_are_not_is_refused_by_name(parameters, message):
    model = RandLora(Raw(), rl.RandLoraConfig(r=R, target_modules=["gate"]), parameters=parameters)
    with pytest.raises(ValueError, match=message):
        model.adapt(Raw().init(jax.random.key(1), X), X)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (({"w": "ab,bc->ac"}, 0), r"input_axes=0 are of one kernel"),
        ((3,), r"kernel must be the parameter's name.*got 3"),
        (({"w": (0, 0)},), r"w must be axes of the kernel"),
    ],
)
def test_a_registration_that_says_nothing_sensible_is_refused(arguments, error):
    with pytest.raises((TypeError, ValueError), match=error):
        rl.register_layer(Raw, *arguments)


def test_the_summary_counts_every_expert():
    case = CASES["both in a model"]
    text = rl.summary(case.trained, case.model.config, tokens=5)
    each = R * 2 + 2 * D
    assert f"{2 * EXPERTS * each:,} of" in text
    found = rl.matching_config(case.trained, case.model.config, lora_rank=1)
    assert 2 * EXPERTS * (found.r + D) * -(-D // found.r) <= 2 * EXPERTS * (D + F)
