"""Bases are as large as layers read them; those of PEFT's sizes, in older files, serve as well."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from safetensors.numpy import load_file

import randlora_jax as rl
from randlora_jax import nnx as rx
from randlora_jax import peft
from randlora_jax.adapters.named import together
from randlora_jax.cli import main
from randlora_jax.linen import RandLora
from tests.peft_adapters import WEIGHTS, in_peft, same_trees

CONFIG = rl.RandLoraConfig(r=3, target_modules=["up", "down"], projection_prng_key=5)
READ = {"randlora_A": (3, 1, 6), "randlora_B": (14, 2, 3)}
IN_PEFT = {"randlora_A": (3, 1, 14), "randlora_B": (14, 5, 3)}
X = jnp.linspace(-1, 1, 18).reshape(3, 6)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="down")(jnp.tanh(nn.Dense(14, name="up")(x)))


class Nnx(nnx.Module):
    def __init__(self, sizes=(6, 14)):
        rngs, (small, large) = nnx.Rngs(0), sizes
        self.up = nnx.Linear(small, large, rngs=rngs)
        self.down = nnx.Linear(large, small, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def shapes(variables):
    return {name: array.shape for name, array in variables["randlora_bases"].items()}


def moved(variables):
    varied = lambda a: a + jnp.linspace(0, 1, a.size, dtype=a.dtype).reshape(a.shape)
    return {**variables, "randlora": jax.tree.map(varied, variables["randlora"])}


@pytest.fixture(scope="module")
def variables():
    """Of a moved adapter, which both front ends read."""
    return moved(RandLora(Linen(), CONFIG).init(jax.random.key(0), X))


@pytest.fixture(scope="module")
def older(variables):
    """The same with bases of PEFT's sizes, as 0.1 had them."""
    return in_peft(variables, CONFIG)


def test_they_are_what_layers_read(variables, older):
    assert shapes(variables) == shapes(rx.variables(rx.inject(Nnx(), CONFIG))) == READ
    assert shapes(older) == IN_PEFT
    by_name = {"up": CONFIG, "down": CONFIG.replace(target_modules=["down"])}
    assert shapes(RandLora(Linen(), by_name).init(jax.random.key(0), X)) == READ


def test_an_inserted_adapter_makes_them_no_larger_than_both_read():
    model = rx.inject(Nnx(), {"up": CONFIG.replace(target_modules=["up"])})
    rx.insert(model, "down", CONFIG.replace(target_modules=["down"]))
    assert shapes(rx.variables(model)) == READ


@pytest.mark.parametrize("save_projection", [True, False])
def test_older_files_serve_in_both_front_ends(variables, older, save_projection, tmp_path):
    config = CONFIG.replace(save_projection=save_projection)
    y = RandLora(Linen(), config).apply(variables, X)
    rl.save_adapter(tmp_path / "older", older, config)
    loaded, _ = rl.load_adapter(tmp_path / "older", {"params": variables["params"]})
    assert same_trees(loaded, older)
    assert (RandLora(Linen(), config).apply(loaded, X) == y).all()
    assert same_trees(rl.merge(loaded, config), rl.merge(variables, config))

    model = Nnx()
    nnx.update(model, nnx.State(variables["params"]))
    rx.load_adapter(tmp_path / "older", model)
    assert shapes(rx.variables(model)) == IN_PEFT
    assert (model(X) == y).all()
    fresh = rx.inject(Nnx(), config)
    assert fresh(X).shape == y.shape
    rx.update(fresh, loaded)
    assert (fresh(X) == y).all()
    narrow = rl.draw_bases(CONFIG, 14, 5)
    with pytest.raises(ValueError, match=r"'\w+': bases of shapes .* too small for a kernel of"):
        rx.update(fresh, {**loaded, "randlora_bases": narrow})
    assert (fresh(X) == y).all()


@pytest.mark.parametrize("first", ["older", "newer"])
def test_adapters_with_older_and_newer_ones_go_together(variables, older, first):
    ours, theirs = (older, variables) if first == "older" else (variables, older)
    one = {**ours, "randlora": together({"a": ours["randlora"]})}
    both, configs = rl.adapters.insert(one, {"a": CONFIG}, "b", theirs, CONFIG)
    assert shapes(both) == IN_PEFT
    for name in configs:
        assert same_trees(rl.adapters.select(both, configs, name)[0], older)


def test_peft_gets_its_own_sizes_whichever_there_are(variables, older, tmp_path):
    larger = rx.variables(rx.inject(Nnx((30, 30)), CONFIG))["randlora_bases"]
    for name, bases in (("a", variables), ("b", older), ("c", {"randlora_bases": larger})):
        given = {**variables, "randlora_bases": bases["randlora_bases"]}
        peft.save_adapter(tmp_path / name, given, CONFIG)
        rl.save_adapter(tmp_path / f"{name} of ours", given, CONFIG)
        assert main(["convert", str(tmp_path / f"{name} of ours"), str(tmp_path / f"{name}2")]) == 0
    files = [load_file(tmp_path / name / WEIGHTS) for name in ("a", "b", "c", "a2", "b2", "c2")]
    assert files[0]["base_model.randlora_A"].shape == (3, 1, 14)
    assert files[0]["base_model.randlora_B"].shape == (14, 5, 3)
    assert all(same_trees(file, files[0]) for file in files[1:])
    assert main(["verify", str(tmp_path / "a2")]) == 0
