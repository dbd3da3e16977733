"""The configuration: PEFT's fields and defaults, what is refused, writing and reading."""

import dataclasses
import json
import math
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from randlora_jax import RandLoraConfig

GOLDEN = sorted((pathlib.Path(__file__).parent / "golden").glob("adapter_*/adapter_config.json"))

PEFT_DEFAULTS = {
    "r": 32,
    "randlora_alpha": 640,
    "projection_prng_key": 0,
    "save_projection": True,
    "sparse": False,
    "very_sparse": False,
    "randlora_dropout": 0.0,
    "fan_in_fan_out": False,
    "bias": "none",
    "target_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    "init_weights": True,
    "task_type": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": False,
    "peft_version": None,
}

# No field has its default value.
EVERYTHING = {
    "r": 7,
    "randlora_alpha": 2.5,
    "projection_prng_key": 2**40 + 3,
    "save_projection": False,
    "very_sparse": True,
    "randlora_dropout": 0.125,
    "fan_in_fan_out": True,
    "bias": "randlora_only",
    "target_modules": ["q_proj", "attn.v_proj"],
    "exclude_modules": ["layers.2.q_proj"],
    "layers_to_transform": [3, 1],
    "layers_pattern": ["layers", "blocks"],
    "modules_to_save": ["head"],
    "init_weights": False,
    "task_type": "CAUSAL_LM",
    "auto_mapping": {"base_model_class": "MLP", "parent_library": "here"},
    "base_model_name_or_path": "some/model",
    "revision": "main",
    "inference_mode": True,
    "peft_version": "0.21.2",
}


def test_every_field_has_the_default_of_peft():
    config = RandLoraConfig()
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    assert fields.pop("exclude_modules") is None  # the one field that PEFT does not have
    assert fields == PEFT_DEFAULTS
    for name, default in PEFT_DEFAULTS.items():
        assert type(fields[name]) is type(default), name


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError, match="'r'"):
        RandLoraConfig().r = 4


def test_equal_values_are_equal_and_hash_alike():
    one, other = RandLoraConfig(**EVERYTHING), RandLoraConfig(**EVERYTHING)
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize("name", EVERYTHING)
def test_configs_that_differ_in_one_field_are_unequal(name):
    config = RandLoraConfig(**EVERYTHING)
    values = dict(EVERYTHING)
    del values[name]
    if name == "layers_to_transform":
        del values["layers_pattern"]
    assert RandLoraConfig(**values) != config


@pytest.mark.parametrize("names", [["b", "a"], ("b", "a"), {"a", "b"}, frozenset("ab")])
def test_any_collection_of_names_is_kept_as_a_tuple(names):
    config = RandLoraConfig(target_modules=names, exclude_modules=names, modules_to_save=names)
    for kept in (config.target_modules, config.exclude_modules, config.modules_to_save):
        assert isinstance(kept, tuple)
        assert set(kept) == {"a", "b"}


def test_equal_sets_give_equal_configs():
    names = [f"layer_{i}" for i in range(50)]
    one = RandLoraConfig(target_modules=set(names))
    assert one == RandLoraConfig(target_modules=set(reversed(names)))


def test_scaling_is_alpha_over_r():
    assert RandLoraConfig().scaling == 20
    assert RandLoraConfig(r=7, randlora_alpha=3).scaling == 3 / 7


def test_numpy_integers_count_as_integers():
    config = RandLoraConfig(r=np.int32(5), projection_prng_key=np.uint32(2**32 - 1))
    assert config == RandLoraConfig(r=5, projection_prng_key=2**32 - 1)
    assert json.loads(config.to_json())["r"] == 5


def test_numpy_integers_count_as_layers():
    config = RandLoraConfig(target_modules=["up"], layers_to_transform=np.int64(5))
    assert config == RandLoraConfig(target_modules=["up"], layers_to_transform=5)
    assert json.loads(config.to_json())["layers_to_transform"] == 5


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.array(0.5)])
@pytest.mark.parametrize("field", ["randlora_alpha", "randlora_dropout"])
def test_numpy_numbers_are_kept_as_those_of_python(field, number):
    kept = getattr(RandLoraConfig(**{field: number}), field)
    assert (type(kept), kept) == (float, 0.5)


@pytest.mark.parametrize("number", [np.int64(3), np.uint8(3), jnp.int32(3), jnp.array(3)])
def test_an_integer_of_any_library_stays_one(number):
    config = RandLoraConfig(
        r=number, randlora_alpha=number, target_modules=["up"], layers_to_transform=number
    )
    expected = RandLoraConfig(r=3, randlora_alpha=3, target_modules=["up"], layers_to_transform=3)
    assert config == expected
    assert config.to_json() == expected.to_json()


def test_numbers_of_jax_are_kept_as_those_of_python():
    config = RandLoraConfig(randlora_alpha=jnp.bfloat16(2.5), randlora_dropout=jnp.float32(0.25))
    assert config == RandLoraConfig(randlora_alpha=2.5, randlora_dropout=0.25)
    assert hash(config) == hash(RandLoraConfig(randlora_alpha=2.5, randlora_dropout=0.25))


@pytest.mark.parametrize("field", ["r", "randlora_alpha", "randlora_dropout"])
def test_a_traced_number_is_refused_by_field(field):
    with pytest.raises(TypeError, match=f"{field} must be"):
        jax.jit(lambda value: RandLoraConfig(**{field: value}).scaling)(1)


EITHER = (TypeError, ValueError)
WRONG = [
    # error, values, what the message has to say
    (ValueError, {"r": 0}, "r .*at least 1.*0"),
    (ValueError, {"r": -3}, "r .*at least 1.*-3"),
    (TypeError, {"r": 2.0}, r"r .*integer.*2\.0"),
    (TypeError, {"r": "8"}, "r .*integer.*'8'"),
    (TypeError, {"r": None}, "r .*integer.*None"),
    (TypeError, {"r": True}, "r .*integer.*True"),
    (TypeError, {"r": np.array(2.5)}, r"r .*integer.*2\.5"),
    (TypeError, {"r": jnp.float32(2.5)}, r"r .*integer.*2\.5"),
    (TypeError, {"r": jnp.array(True)}, "r .*integer.*True"),
    (TypeError, {"r": np.array([3])}, r"r .*integer.*\[3\]"),
    (TypeError, {"projection_prng_key": 1.5}, r"projection_prng_key .*integer.*1\.5"),
    (TypeError, {"projection_prng_key": False}, "projection_prng_key .*integer.*False"),
    (ValueError, {"randlora_alpha": math.nan}, "randlora_alpha .*finite.*nan"),
    (ValueError, {"randlora_alpha": math.inf}, "randlora_alpha .*finite.*inf"),
    (ValueError, {"randlora_alpha": -math.inf}, "randlora_alpha .*finite.*-inf"),
    (TypeError, {"randlora_alpha": "640"}, "randlora_alpha .*number.*'640'"),
    (TypeError, {"randlora_alpha": True}, "randlora_alpha .*number.*True"),
    (TypeError, {"randlora_alpha": np.bool_(True)}, "randlora_alpha .*number.*True"),
    (TypeError, {"randlora_alpha": jnp.array(True)}, "randlora_alpha .*number.*True"),
    (TypeError, {"randlora_alpha": np.complex64(2)}, "randlora_alpha .*number.*2"),
    (TypeError, {"randlora_alpha": np.ones(1)}, r"randlora_alpha .*number.*\[1\.\]"),
    (ValueError, {"randlora_alpha": np.float32(np.nan)}, "randlora_alpha .*finite.*nan"),
    (ValueError, {"randlora_dropout": 1.0}, r"randlora_dropout .*\[0, 1\).*1\.0"),
    (ValueError, {"randlora_dropout": 1.5}, r"randlora_dropout .*\[0, 1\).*1\.5"),
    (ValueError, {"randlora_dropout": -0.1}, r"randlora_dropout .*\[0, 1\).*-0\.1"),
    (ValueError, {"randlora_dropout": math.nan}, r"randlora_dropout .*\[0, 1\).*nan"),
    (TypeError, {"randlora_dropout": False}, "randlora_dropout .*number.*False"),
    (ValueError, {"sparse": True, "very_sparse": True}, "sparse and very_sparse"),
    (ValueError, {"bias": "lora_only"}, "bias .*'none'.*'all'.*'randlora_only'.*'lora_only'"),
    (ValueError, {"bias": None}, "bias .*'none'.*None"),
    (ValueError, {"target_modules": "q_proj("}, r"target_modules.*'q_proj\('.*regular expression"),
    (ValueError, {"exclude_modules": "[a"}, r"exclude_modules.*'\[a'.*regular expression"),
    (TypeError, {"target_modules": ["up", 3]}, "target_modules .*strings.*3"),
    (TypeError, {"exclude_modules": [None]}, "exclude_modules .*strings.*None"),
    (TypeError, {"modules_to_save": "head"}, "modules_to_save .*list.*'head'"),
    (TypeError, {"modules_to_save": [b"head"]}, "modules_to_save .*strings.*b'head'"),
    (ValueError, {"layers_pattern": "layers"}, "layers_pattern='layers'.*layers_to_transform"),
    (
        ValueError,
        {"layers_to_transform": 1, "target_modules": r".*up"},
        r"layers_to_transform.*'\.\*up'.*regular expression.*list",
    ),
    (ValueError, {"layers_to_transform": -1}, "layers_to_transform .*0 or more.*-1"),
    (ValueError, {"layers_to_transform": [2, -5]}, r"layers_to_transform .*0 or more.*-5"),
    (ValueError, {"layers_to_transform": []}, r"layers_to_transform .*\[\]"),
    (ValueError, {"layers_to_transform": True}, "layers_to_transform .*True"),
    (ValueError, {"layers_to_transform": [1.5]}, r"layers_to_transform .*1\.5"),
    (ValueError, {"layers_to_transform": np.array(1.5)}, r"layers_to_transform .*1\.5"),
    (ValueError, {"layers_to_transform": [jnp.float32(1.5)]}, r"layers_to_transform .*1\.5"),
    (EITHER, {"target_modules": 5}, "target_modules.*5"),
    (EITHER, {"target_modules": {5}}, "target_modules.*5"),
    (EITHER, {"layers_to_transform": "ab"}, "layers_to_transform.*'ab'"),
    (EITHER, {"layers_to_transform": 3.5}, r"layers_to_transform.*3\.5"),
    (EITHER, {"layers_to_transform": [None]}, "layers_to_transform.*None"),
    (EITHER, {"layers_to_transform": 1, "layers_pattern": ["("]}, r"layers_pattern.*'\('"),
    (EITHER, {"sparse": "no"}, "sparse.*'no'"),
    (EITHER, {"save_projection": None}, "save_projection.*None"),
]


@pytest.mark.parametrize("error, values, message", WRONG, ids=[str(w[1]) for w in WRONG])
def test_a_wrong_value_is_refused_by_field_and_value(error, values, message):
    with pytest.raises(error, match=message):
        RandLoraConfig(**values)


def test_layers_can_be_chosen_among_all_linear_ones():
    config = RandLoraConfig(target_modules="All-Linear", layers_to_transform=[0, 2])
    assert config.layers_to_transform == (0, 2)


@pytest.mark.parametrize("dropout", [0, 0.0, 0.999])
def test_a_dropout_below_one_is_taken(dropout):
    assert RandLoraConfig(randlora_dropout=dropout).randlora_dropout == dropout


def test_replace_changes_what_it_is_told_and_checks_it():
    config = RandLoraConfig(**EVERYTHING)
    assert config.replace(r=3) == RandLoraConfig(**{**EVERYTHING, "r": 3})
    with pytest.raises(ValueError, match=r"r .*at least 1.*-1"):
        config.replace(r=-1)


def test_dictionary_and_json_round_trips_are_the_identity():
    for config in (RandLoraConfig(), RandLoraConfig(**EVERYTHING)):
        assert RandLoraConfig.from_dict(config.to_dict()) == config
        assert RandLoraConfig.from_json(config.to_json()) == config


def test_the_dictionary_holds_lists_and_names_the_method():
    written = RandLoraConfig(**EVERYTHING).to_dict()
    assert written == EVERYTHING | {"sparse": False, "peft_type": "RANDLORA"}


def test_no_field_unknown_to_peft_is_written_unless_used():
    assert set(RandLoraConfig().to_dict()) == {*PEFT_DEFAULTS, "peft_type"}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.parent.name)
def test_configs_of_peft_are_read_without_warning_and_written_back_the_same(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = json.loads(RandLoraConfig.from_json(path.read_text()).to_json())
    expected = json.loads(path.read_text())
    for values in (written, expected):  # PEFT writes a set, in any order
        if isinstance(values["target_modules"], list):
            values["target_modules"] = set(values["target_modules"])
    assert written == expected


def test_the_golden_configs_are_there():
    assert len(GOLDEN) >= 5


def test_unknown_keys_are_named_in_a_warning_and_dropped():
    values = {"r": 6, "use_dora": True, "alpha_pattern": {}}
    with pytest.warns(UserWarning, match=re.escape("['alpha_pattern', 'use_dora']")):
        assert RandLoraConfig.from_dict(values) == RandLoraConfig(r=6)


def test_another_kind_of_adapter_is_refused():
    with pytest.raises(ValueError, match=r"peft_type .*'RANDLORA'.*'LORA'"):
        RandLoraConfig.from_dict({"peft_type": "LORA", "r": 8})


def test_a_seed_alone_is_no_reason_for_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not RandLoraConfig(save_projection=False).save_projection
