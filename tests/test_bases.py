"""The random bases: shapes, distribution, and that the same seed draws the same bits everywhere."""

import functools
import hashlib
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from randlora_jax import RandLoraConfig, draw_bases
from randlora_jax.bases import num_bases, read_dims, resized, shared_dims
from tests.compiling import shipped_jit

SIZES = st.integers(1, 40)
MODES = {"dense": {}, "sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}

# sha256 of A and B for r=7, seed 11, max_dim 64, min_dim 33: another generator would break every
# checkpoint that holds a seed in place of the bases.
PINNED = {
    "dense": (
        "cb51b03233fc6699a249401fad845a13a7f51f2903ceb6d9bff2ed44a52d3936",
        "de5765f1a9319c90d5ab6f4488ed79fa4896be569b53b371d1539db94aada7b0",
    ),
    "sparse": (
        "9612ddb352393a874327bfa5c95bcd470eb6df6e91ef9483c7ff584397563fe0",
        "a36ef314bdbd6d5682603184d2b76435481d7f62c212158c13805e0f20177c84",
    ),
    "very_sparse": (
        "995b01cf687dec4aa809fe67d9af345877b577cc8c2dcf05e3b58ca67ea4d497",
        "cee03bd0571a2eb65db29697636a72c34722744c4139ca55884bf0878d631183",
    ),
}


def draw(mode, max_dim=64, min_dim=33, *, r=7, seed=11, **kwargs):
    config = RandLoraConfig(r=r, projection_prng_key=seed, **MODES[mode])
    return draw_bases(config, max_dim, min_dim, **kwargs)


@functools.cache
def usual(mode):
    """What `draw(mode)` gives, drawn once for all tests that only read it."""
    return draw(mode)


@functools.cache
def large(mode, min_dim):
    return draw(mode, 500, min_dim)


def sha256(array):
    array = np.asarray(array)
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def hashes(bases):
    return sha256(bases["randlora_A"]), sha256(bases["randlora_B"])


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.mark.parametrize(
    "min_dim, r, expected",
    [(768, 32, 24), (33, 7, 5), (35, 7, 5), (36, 7, 6), (5, 9, 1), (9, 1, 9)],
)
def test_bases_are_as_many_as_give_full_rank(min_dim, r, expected):
    assert num_bases(min_dim, r) == expected


@pytest.mark.parametrize(
    "shapes, expected",
    [
        ([(20, 100), (50, 80)], (100, 50)),
        ([(20, 100), (100, 20)], (100, 100)),
        ([(7, 13)], (13, 7)),
        ([(13, 7), (3, 5), (8, 2)], (13, 7)),
    ],
)
def test_shared_dims_are_the_sides_of_the_elementwise_largest_shape(shapes, expected):
    assert shared_dims(shapes) == expected
    assert shared_dims(iter(reversed(shapes))) == expected


@given(shapes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=4))
def test_what_is_drawn_is_what_layers_read_of_what_peft_has(shapes):
    large, small = max(map(max, shapes)), max(map(min, shapes))
    shared = shared_dims(shapes)
    for mode, options in MODES.items():  # the density of the last is PEFT's
        read = read_dims(RandLoraConfig(**options), iter(shapes))
        assert read == (shared if mode == "very_sparse" else (large, small))
    assert shared[0] == large and shared[1] >= small


def test_bases_of_other_sizes_have_the_same_values(mode):
    config = RandLoraConfig(r=7, projection_prng_key=11, **MODES[mode])
    small, large = draw(mode), draw(mode, 70, 43)
    filled, cut = resized(config, small, 70, 43), resized(config, large, 64, 33)
    if mode == "very_sparse":  # drawn for another density
        part = resized(config, filled, 64, 33)
        assert hashes(part) == hashes(small)
    else:
        assert hashes(filled) == hashes(large) and hashes(cut) == hashes(small)
    for got, expected in ((filled, large), (cut, small)):
        assert {k: (v.dtype, v.shape) for k, v in got.items()} == {
            k: (v.dtype, v.shape) for k, v in expected.items()
        }


@pytest.mark.parametrize("max_dim, min_dim, r", [(10, 6, 4), (64, 33, 7), (31, 5, 9), (12, 12, 1)])
def test_shapes_are_those_of_peft(mode, max_dim, min_dim, r):
    bases = jax.eval_shape(lambda: draw(mode, max_dim, min_dim, r=r))
    assert bases["randlora_A"].shape == (r, 1, min_dim)
    assert bases["randlora_B"].shape == (max_dim, math.ceil(min_dim / r), r)


def test_dense_bases_are_uniform_of_unit_variance():
    for array in large("dense", 301).values():
        values = np.asarray(array, np.float64).ravel()
        deviation = math.sqrt(values.size)
        assert abs(values.mean()) < 5 / deviation
        assert abs((values**2).mean() - 1) < 5 * math.sqrt(0.8) / deviation
        # Uniform: in order, the values lie on a line (Kolmogorov and Smirnov's bound for 1e-6).
        line = np.interp(np.sort(values), [-math.sqrt(3), math.sqrt(3)], [0, 1])
        steps = np.arange(1, values.size + 1) / values.size
        assert np.abs(line - steps).max() < 2.7 / deviation


def test_dense_bases_stay_within_the_square_root_of_three():
    for array in large("dense", 301).values():
        largest = np.abs(np.asarray(array, np.float64)).max()
        assert 1.70 < largest <= math.sqrt(3) * (1 + 1e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dense_bases_are_drawn_in_float32_and_cast_last(dtype):
    wide, narrow = usual("dense"), draw("dense", dtype=dtype)
    for name, array in narrow.items():
        assert wide[name].dtype == jnp.float32
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, wide[name].astype(dtype))


@pytest.mark.parametrize("mode, min_dim", [("sparse", 301), ("very_sparse", 301)])
def test_ternary_signs_have_the_documented_probabilities(mode, min_dim):
    probability = 1 / 6 if mode == "sparse" else 1 / math.sqrt(min_dim)
    bases = large(mode, min_dim)
    for name in ("randlora_A", "randlora_B"):
        signs = np.asarray(bases[name])
        bound = 5 * math.sqrt(probability * (1 - probability) / signs.size)
        assert abs((signs == 1).mean() - probability) < bound
        assert abs((signs == -1).mean() - probability) < bound


@pytest.mark.parametrize("mode", ["sparse", "very_sparse"])
def test_ternary_bases_are_int8_signs(mode):
    bases = usual(mode)
    for name in ("randlora_A", "randlora_B"):
        assert bases[name].dtype == jnp.int8
        assert set(np.unique(bases[name])) == {-1, 0, 1}


@pytest.mark.parametrize(
    "mode, probability", [("sparse", 1 / 6), ("very_sparse", 1 / math.sqrt(33))]
)
def test_the_scale_of_ternary_bases_gives_unit_variance(mode, probability):
    scale = usual(mode)["randlora_scale"]
    assert scale.dtype == jnp.float32
    np.testing.assert_allclose(scale, np.full(2, 1 / math.sqrt(2 * probability)), rtol=1e-6)


@pytest.mark.parametrize("min_dim", [1, 3, 4])
def test_very_sparse_bases_of_tiny_layers_have_unit_variance_too(min_dim):
    bases = draw("very_sparse", 5, min_dim)
    assert set(np.unique(bases["randlora_B"])) == {-1, 1}
    np.testing.assert_array_equal(bases["randlora_scale"], np.ones(2))


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_smaller_bases_are_a_prefix_of_larger_ones(mode):
    small, large = draw(mode, 41, 17), usual(mode)
    np.testing.assert_array_equal(small["randlora_A"], large["randlora_A"][:, :, :17])
    np.testing.assert_array_equal(
        small["randlora_B"], large["randlora_B"][:41, : math.ceil(17 / 7)]
    )


def test_the_same_seed_draws_the_same_bits(mode):
    assert hashes(draw(mode)) == hashes(usual(mode))


@pytest.mark.parametrize("seed", [12, 11 + 2**31])
def test_another_seed_draws_other_bases(mode, seed):
    one, other = hashes(usual(mode)), hashes(draw(mode, seed=seed))
    assert one[0] != other[0]
    assert one[1] != other[1]


@pytest.mark.parametrize("seed", [11 + 2**32, 11 - 2**70])
def test_only_the_low_32_bits_of_a_seed_count(seed):
    assert hashes(draw("dense", seed=seed)) == hashes(usual("dense"))


@pytest.mark.parametrize("spec", [("x", "y"), (("x", "y"), None)])
@pytest.mark.parametrize("mode", ["dense", "very_sparse"])
def test_a_sharded_draw_has_the_same_bits(mode, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = lambda *names: NamedSharding(mesh, PartitionSpec(*names))
    once = draw(mode, 64, 32, r=8)
    shardings = jax.tree.map(lambda _: sharding(), once)
    shardings |= {"randlora_A": sharding(None, None, spec[1]), "randlora_B": sharding(*spec)}
    sharded = shipped_jit(lambda: draw(mode, 64, 32, r=8), out_shardings=shardings)()
    assert sharded["randlora_B"].sharding == sharding(*spec)
    assert hashes(sharded) == hashes(once)


@pytest.mark.parametrize(
    "mode, flag", [("dense", False), ("dense", True), ("very_sparse", False)], indirect=["mode"]
)
def test_the_callers_threefry_setting_changes_nothing(mode, flag):
    with jax.threefry_partitionable(flag):
        assert hashes(shipped_jit(lambda: draw(mode))()) == PINNED[mode]


def test_the_callers_threefry_setting_changes_nothing_outside_jit():
    with jax.threefry_partitionable(False):
        assert hashes(draw("dense")) == PINNED["dense"]


def test_the_callers_default_generator_changes_nothing():
    with jax.default_prng_impl("rbg"):
        assert hashes(draw("sparse")) == PINNED["sparse"]


def test_the_callers_x64_setting_changes_nothing():
    with jax.enable_x64(True):
        assert hashes(draw("dense")) == PINNED["dense"]


def test_another_process_with_other_settings_draws_the_same_bits():
    here = pathlib.Path(__file__)
    code = (
        f"import importlib.util as u, json; s = u.spec_from_file_location('t', {str(here)!r});"
        "t = u.module_from_spec(s); s.loader.exec_module(t);"
        "print(json.dumps({m: t.hashes(t.draw(m)) for m in t.MODES}))"
    )
    env = {**os.environ, "JAX_THREEFRY_PARTITIONABLE": "0", "XLA_FLAGS": "", "JAX_ENABLE_X64": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(here.parents[1]), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {m: list(PINNED[m]) for m in MODES}


def test_bits_are_those_that_were_released(mode):
    assert hashes(draw(mode)) == PINNED[mode]


def test_dense_bases_are_draws_of_jax_random_as_documented():
    key_a, key_b = jax.random.split(jax.random.key(11, impl="threefry2x32"))
    uniform = lambda key, shape: jax.random.uniform(
        key, shape, jnp.float32, -math.sqrt(3), math.sqrt(3)
    )
    bases = usual("dense")
    A = uniform(key_a, (33, 7)).T[:, None, :]
    B = jnp.stack([uniform(jax.random.fold_in(key_b, b), (64, 7)) for b in range(5)], axis=1)
    np.testing.assert_allclose(bases["randlora_A"], A, rtol=0, atol=1e-6)
    np.testing.assert_allclose(bases["randlora_B"], B, rtol=0, atol=1e-6)
