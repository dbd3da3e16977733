"""Adapters on disk: round trips, and loading onto what they do not fit."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import randlora_jax as rl
from randlora_jax.checkpoint.manifest import fingerprints
from tests.checkpoints import base, bits, files, make, trained

CONFIGS = {
    "dense": {},
    "sparse": {"sparse": True},
    "very_sparse": {"very_sparse": True, "bias": "randlora_only"},
    "everything": {"bias": "all", "modules_to_save": ["head"], "layers_pattern": None},
}


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
def test_a_round_trip_is_exact_to_the_bit(tmp_path, values, save_projection):
    variables, config = make(**values, save_projection=save_projection)
    rl.save_adapter(tmp_path / "adapter", variables, config)
    loaded, loaded_config = rl.load_adapter(tmp_path / "adapter", base())
    assert bits(loaded) == bits(variables)
    assert loaded_config == config


def test_every_field_of_the_config_travels(tmp_path):
    variables, config = trained()
    config = dataclasses.replace(
        config,
        randlora_alpha=0.1,
        randlora_dropout=0.25,
        exclude_modules=("tail",),
        task_type="CAUSAL_LM",
        auto_mapping={"parent_library": "here"},
        base_model_name_or_path="some/model",
    )
    rl.save_adapter(tmp_path / "adapter", variables, config)
    assert rl.load_adapter(tmp_path / "adapter", base())[1] == config


def test_a_path_can_be_a_string(tmp_path):
    rl.save_adapter(str(tmp_path / "adapter"), *trained())
    assert bits(rl.load_adapter(str(tmp_path / "adapter"), base())[0]) == bits(trained()[0])


def test_bfloat16_arrays_travel(tmp_path):
    variables, config = make()
    low = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
    variables = variables | {k: low(variables[k]) for k in ("randlora", "randlora_bases")}
    rl.save_adapter(tmp_path / "adapter", variables, config)
    assert bits(rl.load_adapter(tmp_path / "adapter", base())[0]) == bits(variables)


def with_bias(bias):
    """A trained adapter whose head, trained whole, has another bias."""
    variables, config = make(modules_to_save=["head"])
    head = variables["params"]["head"] | {"bias": bias}
    return variables | {"params": variables["params"] | {"head": head}}, config


SAVED = ["bool", "int2", "int4", "int8", "float4_e2m1fn", "float8_e4m3fn", "float16", "complex64"]


@pytest.mark.parametrize("dtype", SAVED)
def test_what_is_trained_whole_can_be_of_any_dtype(tmp_path, dtype):
    numbers = np.random.default_rng(0).integers(-2, 2, 5)
    variables, config = with_bias(jnp.asarray(numbers).astype(dtype))
    rl.save_adapter(tmp_path / "adapter", variables, config)
    assert bits(rl.load_adapter(tmp_path / "adapter", base())[0]) == bits(variables)


@pytest.mark.parametrize(
    "dtype, count", [("bool", 2), ("int2", 4), ("int4", 16), ("float4_e2m1fn", 16)]
)
def test_a_fingerprint_tells_all_values_of_a_small_dtype(dtype, count):
    values = np.arange(count, dtype=np.uint8).view(jnp.dtype(dtype))
    found = fingerprints({str(i): jnp.asarray(values[[i]]) for i in range(count)})
    assert len(set(found.values())) == count


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128, np.float64])
def test_a_fingerprint_tells_every_bit_of_a_large_dtype(dtype):
    number = np.array([1.5, -0.75], dtype)
    with jax.enable_x64(True):
        arrays = {"as it was": jnp.asarray(number)}
        for place in range(number.itemsize * 8):
            flipped = np.unpackbits(number.view(np.uint8))
            flipped[place] ^= 1
            arrays[str(place)] = jnp.asarray(np.packbits(flipped).view(dtype))
        found = fingerprints(arrays)
    assert len(set(found.values())) == len(arrays)


@pytest.mark.parametrize(
    "bias, message",
    [
        (lambda: jnp.ones(5, jnp.uint4), "is uint4, which Orbax can't save"),
        (lambda: jnp.ones(5, jnp.float8_e4m3), "is float8_e4m3, which Orbax can't save"),
        (lambda: jax.random.split(jax.random.key(0), 5), "is key<fry>, which Orbax can't save"),
        (lambda: np.ones(5), r"is float64 .*JAX takes as float32: give jnp\.asarray"),
        (lambda: np.ones(5, np.int64), r"is int64 .*JAX takes as int32: give jnp\.asarray"),
    ],
)
def test_what_could_not_be_read_again_is_refused_by_name(tmp_path, bias, message):
    with pytest.raises(ValueError, match=f"'params.head.bias' {message}"):
        rl.save_adapter(tmp_path / "adapter", *with_bias(bias()))
    assert not os.listdir(tmp_path)


def test_float64_of_jax_s_own_travels(tmp_path):
    with jax.enable_x64(True):
        variables, config = with_bias(jnp.arange(5, dtype=jnp.float64) / 3)
    rl.save_adapter(tmp_path / "adapter", variables, config)
    with jax.enable_x64(True):
        loaded, _ = rl.load_adapter(tmp_path / "adapter", base())
    assert bits(loaded) == bits(variables)


def test_the_base_is_neither_saved_nor_copied_nor_changed(tmp_path):
    variables, config = make(modules_to_save=["head"])
    rl.save_adapter(tmp_path / "adapter", variables, config)
    given = base() | {"batch_stats": {"mean": jnp.arange(3.0)}}
    before = bits(given)
    loaded, _ = rl.load_adapter(tmp_path / "adapter", given)
    for layer in ("up", "mid"):
        for name in ("kernel", "bias"):
            assert loaded["params"][layer][name] is given["params"][layer][name]
    assert loaded["batch_stats"]["mean"] is given["batch_stats"]["mean"]
    assert bits(given) == before
    assert (loaded["params"]["head"]["kernel"] != given["params"]["head"]["kernel"]).all()
    secret = np.asarray(base()["params"]["mid"]["kernel"]).tobytes()
    assert not any(secret in content for content in files(tmp_path).values())


def test_a_checkpoint_without_bases_is_smaller(tmp_path):
    size = {}
    for keep in (True, False):
        variables, config = make(save_projection=keep, modules_to_save=["head"])
        folders = [tmp_path / f"{keep}{i}" for i in range(3)]
        for folder in folders:
            rl.save_adapter(folder, variables, config)
        # The smallest: Orbax at times leaves a part of what it writes in two files.
        size[keep] = min(sum(map(len, files(folder).values())) for folder in folders)
    assert size[False] < size[True] - 1000


def test_bases_that_the_seed_does_not_draw_are_not_thrown_away(tmp_path):
    variables, config = make(save_projection=False)
    foreign = variables["randlora_bases"] | {
        "randlora_A": variables["randlora_bases"]["randlora_A"] * 2
    }
    with pytest.raises(
        ValueError, match=r"save_projection=False.*projection_prng_key=3.*save_proj"
    ):
        rl.save_adapter(tmp_path / "adapter", variables | {"randlora_bases": foreign}, config)
    assert not os.listdir(tmp_path)
    rl.save_adapter(
        tmp_path / "adapter",
        variables | {"randlora_bases": foreign},
        config.replace(save_projection=True),
    )
    loaded, _ = rl.load_adapter(tmp_path / "adapter", base())
    assert bits(loaded["randlora_bases"]) == bits(foreign)


def without(layer):
    return {"params": {k: v for k, v in base()["params"].items() if k != layer}}


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: without("mid"), "'mid'.*another model"),
        (lambda: without("head"), r"head\.(bias|kernel).*another model"),
        (lambda: base(17), "'mid'.*kernel.*17"),
        (lambda: {"params": {}}, "'mid'.*another model"),
    ],
    ids=["no target", "no module to save", "other shapes", "nothing"],
)
def test_another_model_is_refused_by_layer(tmp_path, other, message):
    rl.save_adapter(tmp_path / "adapter", *trained())
    with pytest.raises(ValueError, match=message):
        rl.load_adapter(tmp_path / "adapter", other())


def test_a_trained_head_of_another_shape_is_refused_by_name(tmp_path):
    rl.save_adapter(tmp_path / "adapter", *trained())
    head = {"kernel": jnp.ones((16, 6)), "bias": jnp.ones(6)}
    with pytest.raises(ValueError, match=r"trained 'head\.\w+' of shape .*another model"):
        rl.load_adapter(tmp_path / "adapter", {"params": base()["params"] | {"head": head}})


@pytest.mark.parametrize("save_projection", [True, False])
def test_another_process_with_one_device_loads_what_eight_saved(tmp_path, save_projection):
    variables, config = make(save_projection=save_projection)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    shard = lambda a: jax.device_put(
        a, NamedSharding(mesh, PartitionSpec("x" if a.shape[0] % 8 == 0 else None))
    )
    sharded = variables | {"randlora_bases": jax.tree.map(shard, variables["randlora_bases"])}
    rl.save_adapter(tmp_path / "adapter", sharded, config)
    here = pathlib.Path(__file__)
    code = (
        f"import importlib.util as u, json; s = u.spec_from_file_location('t', {str(here)!r});"
        "t = u.module_from_spec(s); s.loader.exec_module(t); assert t.jax.device_count() == 1;"
        f"v, _ = t.rl.load_adapter({str(tmp_path / 'adapter')!r}, t.base());"
        "print(json.dumps(t.digests(v)))"
    )
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(here.parents[1]), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == digests(variables)


def digests(variables):
    return {k: hashlib.sha256(repr(v).encode()).hexdigest() for k, v in bits(variables).items()}


def test_a_copied_folder_is_the_same_adapter(tmp_path):
    rl.save_adapter(tmp_path / "adapter", *trained())
    shutil.copytree(tmp_path / "adapter", tmp_path / "elsewhere" / "copy")
    shutil.rmtree(tmp_path / "adapter")
    loaded, _ = rl.load_adapter(tmp_path / "elsewhere" / "copy", base())
    assert bits(loaded) == bits(trained()[0])
