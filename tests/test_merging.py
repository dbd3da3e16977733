"""Folding updates into kernels: precision, safety, and what stays as it was."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import randlora_jax as rl
from randlora_jax import RandLoraConfig
from randlora_jax.linen import RandLora
from tests.compiling import shipped_jit
from tests.linen_cases import Case, R, as_numpy, assert_same_bits, normal, plus_update
from tests.linen_models import PLAIN, Block, Scan, block_kernels

X = normal(0, 4, 5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a_merged_kernel_is_the_exact_sum_rounded_once(dtype):
    case = Case(nn.Dense(7, dtype=dtype, param_dtype=dtype), (X.astype(dtype),), PLAIN)
    merged = case.model.merge(case.trained)["kernel"]
    assert merged.dtype == dtype
    trained = as_numpy(case.trained)
    bases = [trained["randlora_bases"][k] for k in ("randlora_A", "randlora_B")]
    with jax.enable_x64(True):
        exact = plus_update(trained["params"], trained["randlora"], bases, PLAIN, 2.0 / R)
    exact = np.asarray(exact["kernel"])
    spacing = np.abs(exact) * float(jnp.finfo(dtype).eps)
    # Half a step from one rounding, and float32's own error; two roundings would show.
    assert (np.abs(as_numpy(merged) - exact) <= 0.51 * spacing + 2e-6).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("stacked", [False, True], ids=["plain", "stacked"])
def test_a_safe_merge_refuses_what_is_not_finite_and_names_the_layer(bad, stacked):
    base = Scan(length=2) if stacked else Block()
    prefix = "layers/inner/" if stacked else ""
    case = Case(base, (X,), block_kernels(prefix, (0,) if stacked else ()))
    node = case.trained["randlora"]
    broken = jax.tree.map_with_path(
        lambda path, a: (
            a.at[(0,) * a.ndim].set(bad)
            if "down" in jax.tree_util.keystr(path) and "lambda" in jax.tree_util.keystr(path)
            else a
        ),
        node,
    )
    broken = {**case.trained, "randlora": broken}
    with pytest.raises(ValueError, match=rf"merging '{prefix.replace('/', '.')}down' gives"):
        case.model.merge(broken)
    merged = case.model.merge(broken, safe=False)
    finite = jax.tree.map(lambda a: bool(jnp.isfinite(a).all()), merged)
    finite = finite["layers"]["inner"] if stacked else finite
    assert finite["up"]["kernel"] and not finite["down"]["kernel"]


def test_merging_keeps_each_arrays_sharding():
    mesh = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    spec = jax.NamedSharding(mesh, jax.P(None, "model"))
    base = nn.Dense(6)
    case = Case(base, (normal(0, 4, 5),), PLAIN)
    kernel = jax.device_put(case.trained["params"]["kernel"], spec)
    params = {**case.trained["params"], "kernel": kernel}
    merged = case.model.merge({**case.trained, "params": params})
    assert merged["kernel"].sharding == spec
    assert merged["bias"] is params["bias"]
    single = case.model.merge(case.trained)["kernel"]
    np.testing.assert_allclose(merged["kernel"], single, rtol=1e-6, atol=1e-6)


def test_merging_under_jit_gives_the_same_kernels():
    case = Case(Block(), (X,), block_kernels())
    assert_same_bits(shipped_jit(case.model.merge)(case.trained), case.model.merge(case.trained))


def test_the_given_parameters_stay_as_they_were():
    case = Case(Block(), (X,), block_kernels())
    before = jax.tree.map(lambda a: a.copy(), case.trained)
    merged = case.model.merge(case.trained)
    assert_same_bits(case.trained, before)
    assert merged["up"]["bias"] is case.trained["params"]["up"]["bias"]


def test_scales_of_another_model_raise_and_name_the_layer():
    case = Case(Block(), (X,), block_kernels())
    scales = case.trained["randlora"]
    with pytest.raises(ValueError, match="'side' has scales in 'randlora' but no kernel"):
        rl.merge({**case.trained, "randlora": {**scales, "side": scales["up"]}}, case.model.config)
    lacking = {**scales, "up": {"randlora_lambda": scales["up"]["randlora_lambda"]}}
    with pytest.raises(ValueError, match=r"lack 'up\.randlora_gamma'"):
        rl.merge({**case.trained, "randlora": lacking}, case.model.config)
    with pytest.raises(ValueError, match=r"'(up|down)': the config has r=2.*made with r=3"):
        rl.merge(case.trained, RandLoraConfig(r=2, target_modules="all-linear"))


def test_a_kernel_that_can_be_read_in_two_ways_asks_for_example_inputs():
    config = RandLoraConfig(r=2, target_modules="all-linear")
    model = RandLora(nn.DenseGeneral(2, axis=(-2, -1)), config)
    x = normal(0, 4, 2, 3)  # (2, 3, 2): 6 x 2 or 2 x 6, both with gamma (1, 2)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"can be any of .*example inputs"):
        model.merge(variables)
    assert model.merge(variables, x)["kernel"].shape == (2, 3, 2)
