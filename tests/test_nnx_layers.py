"""NNX layers: outputs before and after training, what stays as it was, and what is refused."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import randlora_jax as rl
from randlora_jax import register_layer
from randlora_jax.nnx import (
    RandLoraBasis,
    RandLoraParam,
    inject,
    lend_bases,
    merge,
    remove,
    set_active,
    trainable,
    update,
    variables,
)
from tests.nnx_models import (
    CONFIG,
    MLP,
    Block,
    D,
    OwnEinsum,
    Stack,
    assert_close,
    in_float64,
    randomised,
    trained,
    x,
)


class Loud(nnx.Linear):
    """A subclass with an argument of its own, which calls its super."""

    def __call__(self, x, *, gain=1.0):
        return jnp.tanh(super().__call__(gain * x))


class Own(nnx.Linear):
    """A subclass that ignores its attribute `dot_general`, and has a second method."""

    def __call__(self, x):
        return jnp.sin(x @ self.kernel[...])

    def transposed(self, y):
        return y @ self.kernel[...].T


class Einsum(nnx.Einsum):
    """One with a fixed equation for each shape."""


class Gated(nnx.Module):
    """A raw parameter that belongs to no layer: (gates, features, in)."""

    def __init__(self, *, rngs):
        self.gating = nnx.Param(rngs.normal((2, 3, D)))

    def __call__(self, x):
        gate, up = jnp.einsum("bi,goi->gbo", x, self.gating[...])
        return jnp.tanh(gate) * up


def attention(**options):
    return nnx.MultiHeadAttention(2, D, decode=False, rngs=nnx.Rngs(0), **options)


HEADS = {f"{n}/kernel": ((0,), ()) for n in ("query", "key", "value")}
# name: (how the base is made, its adapted kernels, the input's shape, how it is called)
CASES = {
    "linear": (lambda: nnx.Linear(D, 8, rngs=nnx.Rngs(0)), {"kernel": ((0,), ())}, (5, D)),
    "tall": (lambda: nnx.Linear(8, D, rngs=nnx.Rngs(0)), {"kernel": ((0,), ())}, (2, 3, 8)),
    "general": (
        lambda: nnx.LinearGeneral((2, 3), (4, 5), axis=(1, -1), rngs=nnx.Rngs(0)),
        {"kernel": ((0, 1), ())},
        (7, 2, 3),
    ),
    "one_token": (
        lambda: nnx.LinearGeneral(D, (4, 5), rngs=nnx.Rngs(0)),
        {"kernel": ((0,), ())},
        (D,),
    ),
    "subclass": (lambda: Loud(D, 8, rngs=nnx.Rngs(0)), {"kernel": ((0,), ())}, (5, D)),
    "no_door": (
        lambda: Own(D, 8, use_bias=False, rngs=nnx.Rngs(0)),
        {"kernel": ((0,), ())},
        (5, D),
    ),
    "einsum": (
        lambda: Einsum("bti,oin->bton", (4, D, 3), (4, 3), rngs=nnx.Rngs(0)),
        {"kernel": ((1,), ())},
        (2, 5, D),
    ),
    "einsum_dots": (
        lambda: Einsum("...hi,hio->...o", (2, D, 3), rngs=nnx.Rngs(0)),
        {"kernel": ((0, 1), ())},
        (2, 5, 2, D),
    ),
    "einsum_order": (
        lambda: Einsum("bti,io->obt", (D, 4), rngs=nnx.Rngs(0)),
        {"kernel": ((0,), ())},
        (2, 5, D),
    ),
    "own_einsum": (
        lambda: OwnEinsum("bti,oin->bton", (4, D, 3), rngs=nnx.Rngs(0)),
        {"w": ((1,), ())},
        (2, 5, D),
    ),
    "attention": (attention, {**HEADS, "out/kernel": ((0, 1), ())}, (2, 5, D)),
    "list": (
        lambda: MLP(rngs=nnx.Rngs(0)),
        {f"layers/{i}/{n}/kernel": ((0,), ()) for i in (0, 1) for n in ("up", "down")}
        | {"head/kernel": ((0,), ())},
        (5, D),
    ),
    "stack": (
        lambda: Stack(rngs=nnx.Rngs(0)),
        {f"blocks/{n}/kernel": ((0,), (0,)) for n in ("up", "down")} | {"head/kernel": ((0,), ())},
        (5, D),
    ),
    "stack_on_axis_1": (
        lambda: Stack(axis=1, rngs=nnx.Rngs(0)),
        {f"blocks/{n}/kernel": ((0,), (1,)) for n in ("up", "down")} | {"head/kernel": ((0,), ())},
        (5, D),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_untrained_output_has_the_base_s_bits(name):
    make, _, shape = CASES[name]
    model, base = make(), make()
    inject(model, CONFIG)
    np.testing.assert_array_equal(model(x(0, *shape)), base(x(0, *shape)))
    assert isinstance(model, type(base))


@pytest.mark.parametrize(
    ("name", "strategy"),
    [*((name, "auto") for name in CASES), ("general", "merged"), ("general", "factored")],
)
def test_trained_output_equals_the_formula_in_float64(name, strategy):
    make, kernels, shape = CASES[name]
    model = trained(make(), strategy=strategy)
    expected = in_float64(make, model, kernels, lambda m, x: m(x), x(0, *shape))
    actual = np.asarray(model(x(0, *shape)), np.float64)
    assert np.abs(actual - make()(x(0, *shape))).max() > 1e-2  # the update is really there
    assert_close(actual, expected, 2e-5)


@pytest.mark.parametrize("name", CASES)
def test_merging_gives_the_same_output_and_the_classes_back(name):
    make, _, shape = CASES[name]
    model = trained(make())
    y, base = model(x(0, *shape)), make()
    assert merge(model) is model
    assert_close(np.asarray(model(x(0, *shape))), np.asarray(y), 2e-5)
    assert [type(m) for _, m in nnx.iter_modules(model)] == [
        type(m) for _, m in nnx.iter_modules(base)
    ]
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(base))


def test_removing_restores_the_base():
    model, base = trained(MLP(rngs=nnx.Rngs(0))), MLP(rngs=nnx.Rngs(0))
    remove(model)
    assert nnx.graphdef(model) == nnx.graphdef(base)
    np.testing.assert_array_equal(model(x()), base(x()))


def test_state_has_the_base_s_paths_and_one_pair_of_bases():
    model, base = MLP(rngs=nnx.Rngs(0)), MLP(rngs=nnx.Rngs(0))
    inject(model, CONFIG)
    _, added, bases, rest = nnx.split(model, RandLoraParam, RandLoraBasis, ...)
    assert jax.tree.structure(rest) == jax.tree.structure(nnx.state(base))
    assert sorted(bases) == ["randlora_A", "randlora_B"]
    assert added["layers"][1]["up"]["randlora_lambda"].shape == (3, 2)
    assert nnx.state(model, nnx.LoRAParam) == added


def test_scales_and_bases_are_those_of_linen():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="b")(nn.Dense(8, name="a")(x))

    config = CONFIG.replace(init_weights=False, very_sparse=True)
    model = nnx.Dict(a=nnx.Linear(D, 8, rngs=nnx.Rngs(0)), b=nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    inject(model, config)
    params = variables(model)["params"]
    expected = rl.linen.RandLora(Linen(), config).adapt({"params": params}, x())
    jax.tree.map(np.testing.assert_array_equal, variables(model), expected)
    values = {**expected, "randlora": randomised(expected["randlora"])}
    update(model, values)
    with lend_bases(model):
        y = model.b(model.a(x()))
    np.testing.assert_array_equal(y, rl.linen.RandLora(Linen(), config).apply(values, x()))


@pytest.mark.parametrize("name", ["linear", "own_einsum", "einsum", "stack", "attention"])
def test_gradients_are_those_of_the_dense_kernel(name):
    make, _, shape = CASES[name]
    graphdef, scales, rest = nnx.split(trained(make()), RandLoraParam, ...)

    def loss(scales, change):
        model = change(nnx.merge(graphdef, scales, rest, copy=True))
        return jnp.sum(jnp.sin(model(x(0, *shape))))

    gradients = lambda change: jax.tree.map(
        np.asarray, nnx.to_pure_dict(jax.jit(jax.grad(lambda s: loss(s, change)))(scales))
    )
    assert_close(gradients(lambda m: m), gradients(lambda m: merge(m, safe=False)), 1e-4)


def test_arguments_of_the_call_pass_through():
    model = trained(Loud(D, 8, rngs=nnx.Rngs(0)))
    assert bool((model(x(), gain=2.0) == model(2 * x())).all())


def test_tied_modules_stay_tied_and_are_adapted_once():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(D, D, rngs=rngs)
            self.b = self.a

        def __call__(self, x):
            return self.b(self.a(x))

    model = trained(Tied(nnx.Rngs(0)))
    assert model.a is model.b
    assert list(variables(model)["randlora"]) == ["a"]
    y = model(x())
    assert_close(np.asarray(merge(model)(x())), np.asarray(y), 1e-5)


@pytest.mark.parametrize(
    "hold",
    [
        lambda a, b: nnx.List([a, b]),
        lambda a, b: nnx.data([a, b]),
        lambda a, b: nnx.data({"0": a, "1": b}),
        lambda a, b: nnx.Dict({"0": a, "1": b}),
        lambda a, b: nnx.data((a, b)),
    ],
)
def test_containers(hold):
    class Holder(nnx.Module):
        def __init__(self, rngs):
            self.inner = hold(nnx.Linear(D, 4, rngs=rngs), nnx.Linear(D, 5, rngs=rngs))

        def __call__(self, x):
            key = "1" if hasattr(self.inner, "keys") else 1
            return self.inner[key](x)

    model = trained(Holder(nnx.Rngs(0)), CONFIG.replace(target_modules=["inner.1"]))
    assert list(variables(model)["randlora"]["inner"]) == ["1"]
    y = model(x())
    assert_close(np.asarray(merge(model)(x())), np.asarray(y), 1e-5)


def test_raw_parameters_by_path():
    make = lambda: Gated(rngs=nnx.Rngs(0))
    model = trained(make(), CONFIG.replace(target_modules=["gating"]), parameters={"gating": (2,)})
    assert list(variables(model)["randlora"]) == ["gating[2]"]
    expected = in_float64(make, model, {"gating": ((2,), ())}, lambda m, x: m(x), x())
    assert_close(np.asarray(model(x()), np.float64), expected, 2e-5)


def test_kernels_stored_out_in():
    class Conv1D(nnx.Module):
        def __init__(self, rngs):
            self.kernel = nnx.Param(rngs.normal((4, D)))

        def __call__(self, x):
            return x @ self.kernel[...].T

    register_layer(Conv1D)
    make = lambda: Conv1D(nnx.Rngs(0))
    model = trained(make(), CONFIG.replace(fan_in_fan_out=True))
    expected = in_float64(make, model, {"kernel": ((1,), ())}, lambda m, x: m(x), x())
    assert_close(np.asarray(model(x()), np.float64), expected, 2e-5)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        inject(nnx.Linear(D, 4, rngs=nnx.Rngs(0)), CONFIG.replace(fan_in_fan_out=True))


def test_other_methods_of_model_and_layer_are_adapted():
    model = trained(MLP(rngs=nnx.Rngs(0)))
    y = model.features(x())
    layer = trained(Own(D, 8, use_bias=False, rngs=nnx.Rngs(0)))
    z = layer.transposed(x(1, 5, 8))
    assert_close(np.asarray(merge(model).features(x())), np.asarray(y), 1e-5)
    assert_close(np.asarray(merge(layer).transposed(x(1, 5, 8))), np.asarray(z), 1e-5)


def test_a_part_called_by_itself_is_refused_or_lent_the_bases():
    model = trained(MLP(rngs=nnx.Rngs(0)))
    with pytest.raises(RuntimeError, match=r"Linear was called outside of its model.*lend_bases"):
        model.layers[0](x())
    with lend_bases(model):
        y = model.layers[0](x())
    with pytest.raises(RuntimeError, match="outside"):
        model.layers[0](x())
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


def test_a_kernel_that_two_modules_hold_is_refused():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)
            self.b.kernel = self.a.kernel

    with pytest.raises(ValueError, match="the 'kernel' of 'a' is that of another module too"):
        inject(Tied(nnx.Rngs(0)), CONFIG)


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


def test_layers_of_a_stack_that_are_left_out():
    config = CONFIG.replace(
        target_modules=["up", "down"], layers_to_transform=[2, 0], layers_pattern="blocks"
    )
    make = lambda: Stack(rngs=nnx.Rngs(0))
    model = trained(make(), config)
    scales = variables(model)["randlora"]["blocks"]["up"]
    assert scales["randlora_lambda"].shape[0] == 2
    grads = nnx.grad(lambda m: jnp.sum(m(x()) ** 2), argnums=nnx.DiffState(0, RandLoraParam))(model)
    for grad in jax.tree.leaves(grads):
        assert bool((grad[1] == 0).all()) and bool((grad[0] != 0).any())
    # As if the middle layer's update were zero: merging by Linen's own rule.
    y, before = model(x()), make().blocks.up.kernel[...]
    merge(model)
    assert_close(np.asarray(model(x())), np.asarray(y), 1e-5)
    same = [bool((a == b).all()) for a, b in zip(model.blocks.up.kernel[...], before, strict=True)]
    assert same == [False, True, False]


def test_layers_of_a_list_that_are_left_out():
    config = CONFIG.replace(target_modules=["up"], layers_to_transform=1)
    model = inject(MLP(rngs=nnx.Rngs(0)), config)
    assert list(variables(model)["randlora"]["layers"]) == ["1"]


def test_several_adapters_switch_sum_and_merge():
    configs = {
        "a": CONFIG.replace(target_modules=["up"]),
        "b": CONFIG.replace(target_modules=["up", "head"], randlora_alpha=5.0),
    }
    make = lambda: MLP(rngs=nnx.Rngs(0))
    model = trained(make(), configs)
    values, y = variables(model), model(x())
    for name in configs:
        set_active(model, (name,))
        one, config = rl.adapters.select(values, configs, name)
        alone = inject(make(), config, values=one)
        assert_close(np.asarray(model(x())), np.asarray(alone(x())), 1e-6)
    set_active(model, ())
    np.testing.assert_array_equal(model(x()), make()(x()))
    set_active(model, None)
    np.testing.assert_array_equal(model(x()), y)
    assert_close(np.asarray(merge(model)(x())), np.asarray(y), 1e-5)
    with pytest.raises(ValueError, match="projection_prng_key"):
        inject(make(), {**configs, "c": CONFIG.replace(projection_prng_key=1)})
    with pytest.raises(ValueError, match="'c'"):
        inject(make(), configs, active=("c",))


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


def test_dropout_without_rngs_gets_flax_s_error_and_untrained_dropout_changes_nothing():
    config = CONFIG.replace(randlora_dropout=0.5)
    model = inject(MLP(rngs=nnx.Rngs(0)), config)
    with pytest.raises(ValueError, match="no `rngs` argument"):
        model(x())
    model = inject(MLP(rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model(x()), MLP(rngs=nnx.Rngs(0))(x()))


def test_a_missing_stream_for_dropout_changes_nothing():
    model = MLP(rngs=nnx.Rngs(0))
    graphdef = nnx.graphdef(model)
    with pytest.raises(KeyError, match="dropout"):
        inject(model, CONFIG.replace(randlora_dropout=0.5), rngs=nnx.Rngs(params=0))
    assert nnx.graphdef(model) == graphdef


def test_dropout_on_a_raw_parameter_is_refused():
    config = CONFIG.replace(target_modules=["gating"], randlora_dropout=0.5)
    model = inject(Gated(rngs=nnx.Rngs(0)), config, parameters={"gating": (2,)}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="raw parameter 'gating'"):
        model(x())


def test_a_trained_bias_and_modules_to_save_have_a_filter():
    paths = lambda m: {
        "/".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(m, trainable(m)))
    }
    make = lambda **c: inject(MLP(1, rngs=nnx.Rngs(0)), CONFIG.replace(target_modules=["up"], **c))
    scales = {f"layers/0/up/randlora_{s}" for s in ("lambda", "gamma")}
    assert paths(make()) == scales and trainable(make()) is RandLoraParam
    assert paths(make(bias="randlora_only")) == scales | {"layers/0/up/bias"}
    assert paths(make(bias="all")) == scales | {
        "layers/0/up/bias", "layers/0/down/bias", "head/bias",
    }  # fmt: skip
    assert paths(make(modules_to_save=["head"])) == scales | {"head/kernel", "head/bias"}


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16},
        {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "preferred_element_type": jnp.float32},
    ],
)
def test_bfloat16_and_mixed_dtypes(options):
    make = lambda: nnx.Linear(D, 8, rngs=nnx.Rngs(0), **options)
    value = x().astype(options.get("dtype", jnp.float32))
    with jax.numpy_dtype_promotion("standard"):
        model = trained(make())
        y = model(value)
        assert y.dtype == make()(value).dtype
        assert model.randlora_lambda[...].dtype == jnp.float32
        dtype = model.kernel[...].dtype
        merge(model)
        assert model.kernel[...].dtype == dtype
        assert_close(np.asarray(model(value), np.float32), np.asarray(y, np.float32), 5e-2)


def test_summary_reads_an_injected_model():
    model = inject(MLP(rngs=nnx.Rngs(0)), CONFIG)
    text = rl.summary(variables(model), CONFIG)
    assert "layers.1.down  (8, 6)" in text and "one pair for all layers" in text


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
            "needs stacks on axis 0",
        ),
        (
            lambda: nnx.LinearGeneral(D, 4, batch_axis={0: 5}, rngs=nnx.Rngs(0)),
            {},
            "batch_axis.*exclude_modules",
        ),
        (
            lambda: nnx.Einsum("ni,nio->no", (5, D, 3), rngs=nnx.Rngs(0)),
            {},
            "no linear map by one kernel",
        ),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_changed(make, changes, message):
    model = make()
    graphdef = nnx.graphdef(model)
    with pytest.raises(ValueError, match=message):
        inject(model, CONFIG.replace(**changes))
    assert nnx.graphdef(model) == graphdef


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
