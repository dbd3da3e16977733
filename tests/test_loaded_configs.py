"""A loaded adapter and its config are one thing: they make the model, or the model is refused."""

import jax
import orbax.checkpoint as ocp
import pytest

import randlora_jax as rl
from randlora_jax import nnx as rx
from randlora_jax.linen import RandLora
from tests.linen_cases import assert_close, assert_same_bits, randomised
from tests.nnx_models import unchanged_if_it_fails
from tests.refused_models import Model, NnxModel, X

CONFIG = rl.RandLoraConfig(r=3, randlora_alpha=2.0, target_modules=["up", "head"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    adapted = RandLora(Model(), CONFIG).adapt(Model().init(jax.random.key(0), X), X)
    adapted = {**adapted, "randlora": randomised(adapted["randlora"])}
    rl.save_adapter(path / "adapter", adapted, CONFIG)
    with ocp.CheckpointManager(path / "manager") as manager:
        manager.save(1, args=ocp.args.Composite(adapter=rl.AdapterSave(adapted, CONFIG)))
    return path, adapted


def through_a_folder(saved, config):
    path, adapted = saved
    return rl.load_adapter(path / "adapter", {"params": adapted["params"]}, config)


def through_a_manager(saved, config):
    path, adapted = saved
    with ocp.CheckpointManager(path / "manager") as manager:
        args = rl.AdapterRestore({"params": adapted["params"]}, config)
        return manager.restore(1, args=ocp.args.Composite(adapter=args)).adapter


def into_an_injected_model(saved, config):
    model = rx.inject(NnxModel(), config)
    with unchanged_if_it_fails(model):
        loaded = rx.load_adapter(saved[0] / "adapter", model)
    return rx.variables(model), loaded


LOADS = pytest.mark.parametrize(
    "load", [through_a_folder, through_a_manager, into_an_injected_model]
)


@LOADS
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"randlora_alpha": 5.0}, "randlora_alpha is 2.0 there and 5.0 in the model"),
        ({"projection_prng_key": 1}, "projection_prng_key is 0 there and 1 in the model"),
        ({"sparse": True}, "sparse is False there and True"),
        ({"randlora_dropout": 0.5}, "randlora_dropout is 0.0 there and 0.5"),
        ({"bias": "all"}, "bias is 'none' there and 'all'"),
        ({"r": 2, "randlora_alpha": 1.0}, "r is 3 there and 2 in the model; randlora_alpha is"),
        ({"target_modules": ["up"]}, r"target_modules is \('up', 'head'\) there and \('up',\)"),
    ],
)
def test_a_model_with_another_config_is_refused(load, saved, changed, message):
    with pytest.raises(ValueError, match=rf"adapter has another config.*{message}.*RandLora\(base"):
        load(saved, CONFIG.replace(**changed))


@LOADS
@pytest.mark.parametrize(
    "same",
    [
        {},
        {"target_modules": ["head", "up"]},
        {"init_weights": False},
        {"projection_prng_key": 2**32, "modules_to_save": [], "exclude_modules": ()},
        {"save_projection": False, "task_type": "CAUSAL_LM", "revision": "main"},
    ],
)
def test_a_model_that_computes_and_trains_the_same_is_none(load, saved, same):
    variables, config = load(saved, CONFIG.replace(**same))
    assert config == CONFIG
    assert_same_bits(variables["randlora"], saved[1]["randlora"])


def test_what_is_loaded_makes_the_model_in_one_line(saved):
    variables, config = through_a_folder(saved, None)
    expected = RandLora(Model(), CONFIG).apply(saved[1], X)
    assert_same_bits(RandLora(Model(), config).apply(variables, X), expected)
    model = NnxModel()
    rx.load_adapter(saved[0] / "adapter", model)
    merged = NnxModel()
    rx.load_adapter(saved[0] / "adapter", merged)
    assert_close(rx.merge(merged)(X), model(X), 1e-5)


def test_what_is_no_config_is_refused(saved):
    with pytest.raises(TypeError, match="config must be a RandLoraConfig, got str"):
        through_a_folder(saved, "all-linear")
