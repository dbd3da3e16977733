"""Checkpoints that hold scales alone are tied to their config and bases."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import randlora_jax as rl
from randlora_jax import nnx as rx
from randlora_jax.linen import RandLora

CONFIG = rl.RandLoraConfig(r=2, target_modules="all-linear")
X = jnp.ones((1, 4))


def linen(config=CONFIG, **options):
    return RandLora(nn.Dense(3), config, **options).init(jax.random.key(0), X)


def in_place(config=CONFIG, **options):
    return rx.variables(rx.inject(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), config, **options))


FRONT_ENDS = pytest.mark.parametrize("make", [linen, in_place])


@FRONT_ENDS
def test_the_same_adapter_goes_on_whatever_it_has_learned(make, tmp_path):
    variables = make()
    for _ in range(2):
        rl.pin_adapter(tmp_path / "steps", variables, CONFIG)
        scales = jax.tree.map(lambda a: a + 1, variables["randlora"])
        variables = {**variables, "randlora": scales}
    assert [p.name for p in (tmp_path / "steps").iterdir()] == ["randlora.json"]
    rl.pin_adapter(tmp_path / "steps", variables, CONFIG.replace(inference_mode=True))


@FRONT_ENDS
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"randlora_alpha": 7}, r"another config: randlora_alpha is 640 there and 7 in the model"),
        ({"projection_prng_key": 3}, r"projection_prng_key is 0 there and 3"),
        ({"r": 3}, r"r is 2 there and 3"),
        ({"sparse": True}, r"sparse is False there and True"),
    ],
)
def test_another_config_is_refused_and_the_file_stays(make, changes, message, tmp_path):
    rl.pin_adapter(tmp_path, make(), CONFIG)
    before = (tmp_path / "randlora.json").read_bytes()
    other = CONFIG.replace(**changes)
    with pytest.raises(ValueError, match=message):
        rl.pin_adapter(tmp_path, make(other), other)
    assert (tmp_path / "randlora.json").read_bytes() == before


@FRONT_ENDS
def test_other_bases_of_the_same_config_are_refused(make, tmp_path):
    rl.pin_adapter(tmp_path, make(), CONFIG)
    with pytest.raises(ValueError, match="trained on other bases"):
        rl.pin_adapter(tmp_path, make(bases_dtype=jnp.bfloat16), CONFIG)


@FRONT_ENDS
def test_several_adapters_are_known_by_their_names(make, tmp_path):
    configs = {"a": CONFIG, "b": CONFIG.replace(randlora_alpha=4)}
    rl.pin_adapter(tmp_path, make(configs), configs)
    rl.pin_adapter(tmp_path, make(configs), configs)
    with pytest.raises(ValueError, match=r"of the adapters \['a', 'b'\], and not \['a'\]"):
        rl.pin_adapter(tmp_path, make({"a": CONFIG}), {"a": CONFIG})
    swapped = {"a": configs["b"], "b": CONFIG}
    with pytest.raises(ValueError, match="randlora_alpha is 640 there and 4"):
        rl.pin_adapter(tmp_path, make(swapped), swapped)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"configs": {"": 3}}'])
def test_a_damaged_file_is_told(text, tmp_path):
    (tmp_path / "randlora.json").write_text(text)
    with pytest.raises(ValueError, match=r"randlora\.json is cut short or altered"):
        rl.pin_adapter(tmp_path, linen(), CONFIG)


def test_orbax_s_manager_does_not_mind_the_file(tmp_path):
    variables = linen()
    rl.pin_adapter(tmp_path, variables, CONFIG)
    trainable, _ = rl.split(variables, CONFIG)
    state = optax.adam(1e-3).init(trainable)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.StandardSave({"scales": trainable, "state": state}))
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [3]
    rl.pin_adapter(tmp_path, variables, CONFIG)
