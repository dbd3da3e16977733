"""Every kind of NNX layer: its output before and after training, merged, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import register_layer
from randlora_jax.nnx import RandLoraParam, inject, merge, variables
from tests.nnx_cases import CASES, Gated
from tests.nnx_models import CONFIG, D, assert_close, in_float64, trained, x


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


@pytest.mark.parametrize(
    "name", ["linear", "own_einsum", "plain_einsum", "einsum", "stack", "attention"]
)
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


@pytest.mark.parametrize("equation", ["bti,io->bto", "bti,io->obt"])
def test_the_layer_s_own_einsum_op_computes_the_update_too(equation):
    """Nothing tells what it does with its kernel besides, however few the tokens."""
    doubled = lambda *args, **options: 2 * jnp.einsum(*args, **options)
    make = lambda: nnx.Einsum(equation, (D, 8), einsum_op=doubled, rngs=nnx.Rngs(0))
    model = trained(make())
    y = np.asarray(model(x(0, 1, 1, D)))
    assert_close(np.asarray(merge(model)(x(0, 1, 1, D))), y, 1e-5)


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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_narrow_kernels_under_strict_promotion_get_wide_scales(dtype):
    model = nnx.Linear(D, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    model.kernel.set_value(model.kernel[...].astype(dtype))
    before = model(x())
    inject(model, CONFIG)
    assert model.randlora_lambda[...].dtype == jnp.float32
    np.testing.assert_array_equal(model(x()), before)
    assert merge(model).kernel[...].dtype == dtype


class Heads(nnx.Module):
    """Projections of as many heads as there are layers, stacked along an axis within the kernel."""

    axes = nnx.StateAxes({nnx.Param: 1, ...: 0})

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=self.axes)
        def make(rngs):
            return nnx.LinearGeneral((3, 2), D, axis=(-2, -1), rngs=rngs)

        self.layers = make(rngs)
        # Where the stack is, its shape does not tell; and one name alone does not either.
        metadata = {nnx.PARTITION_NAME: "layers", "out_sharding": ("heads", "layers", None, None)}
        self.layers.kernel.set_metadata(**metadata)

    def __call__(self, x):
        run = nnx.scan(
            lambda x, layer: jnp.tile(layer(x)[..., None, :2], (3, 1)),
            in_axes=(nnx.Carry, self.axes),
            out_axes=nnx.Carry,
        )
        return run(x, self.layers)


def test_a_variable_that_names_its_stack_s_axis_is_believed():
    with nnx.use_eager_sharding(False):  # there is no mesh that the names could mean
        model = trained(Heads(nnx.Rngs(0)))
    lam = variables(model)["randlora"]["layers"]["randlora_lambda"]
    assert lam.shape[1] == 3 and lam.ndim == 3
    y = np.asarray(model(x(0, 2, 3, 2)))
    assert_close(np.asarray(merge(model)(x(0, 2, 3, 2))), y, 1e-5)
    assert np.abs(y - Heads(nnx.Rngs(0))(x(0, 2, 3, 2))).max() > 1e-3
