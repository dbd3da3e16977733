"""What is done with divided bases besides computing: merging, exports, more adapters, loading."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import randlora_jax as rl
from randlora_jax import nnx as rx
from randlora_jax.linen import RandLora
from tests.linen_cases import normal, randomised

CONFIG = rl.RandLoraConfig(r=4, randlora_alpha=8, target_modules=["first"])
OTHER = CONFIG.replace(target_modules=["second"])
KINDS = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
X = normal(0, 8, 16)


class Two(nn.Module):
    """Layers of which neither's bases serve the other: (64, 16) and (16, 21) of a large side."""

    sizes: tuple[int, int] = (64, 20)

    @nn.compact
    def __call__(self, x):
        wide, last = self.sizes
        x = nn.Dense(16, use_bias=False, name="back")(nn.Dense(wide, name="first")(x))
        return nn.Dense(last, use_bias=False, name="second")(x)


def on(mesh, tree, *axes):
    return jax.device_put(tree, NamedSharding(mesh, P(*axes)))


def divided(kind, config=CONFIG, sizes=(64, 20)):
    """A mesh, the base's parameters on it, and variables there with divided bases."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    base = Two(sizes)
    params = on(mesh, base.init(jax.random.key(1), X)["params"])
    variables = RandLora(base, config).adapt({"params": params}, X)
    scales = jax.tree.map(
        lambda a, b: jax.device_put(b, a.sharding),
        variables["randlora"], randomised(variables["randlora"]),
    )  # fmt: skip
    variables = {**variables, "randlora": scales}
    return mesh, jax.device_put(variables, rl.sharding(variables, config, bases_axes=["model"]))


def here(tree):
    """The same on one device."""
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), tree)


def same(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), one, other)


@KINDS
@pytest.mark.parametrize("jitted", [False, True])
def test_merging(kind, jitted):
    mesh, variables = divided(kind)
    assert variables["randlora_bases"]["randlora_B"].sharding.spec[0] == "model"
    merge = lambda v: rl.merge(v, CONFIG, safe=False)
    with jax.set_mesh(mesh):
        merged = (jax.jit(merge) if jitted else merge)(variables)
    same(merged, rl.merge(here(variables), CONFIG))


@KINDS
def test_exports_and_saving(kind, tmp_path):
    mesh, variables = divided(kind)
    with jax.set_mesh(mesh):
        rl.save_adapter(tmp_path / "ours", variables, CONFIG)
        rl.peft.save_adapter(tmp_path / "theirs", variables, CONFIG)
    base = {"params": here(variables["params"])}
    loaded, _ = rl.load_adapter(tmp_path / "ours", base)
    same(loaded, here(variables))
    theirs, _ = rl.peft.load_adapter(tmp_path / "theirs", base)
    same(theirs["randlora"], here(variables["randlora"]))


@KINDS
@pytest.mark.parametrize("sizes", [(64, 20), (20, 64), (64, 21)])
def test_another_adapter_beside_it(kind, sizes):
    mesh, variables = divided(kind, {"a": CONFIG}, sizes)
    base = Two(sizes)
    added = RandLora(base, OTHER).adapt({"params": variables["params"]}, X)
    with jax.set_mesh(mesh):
        both, configs = rl.adapters.insert(variables, {"a": CONFIG}, "b", added, OTHER)
        y = RandLora(base, configs).apply(both, on(mesh, X))
    B = both["randlora_bases"]["randlora_B"]
    assert B.sharding.mesh.shape == mesh.shape
    assert B.sharding.spec[0] == ("model" if B.shape[0] % 2 == 0 else None)
    alone = RandLora(base, {"a": CONFIG}).apply(here(variables), X)
    same(np.asarray(y), np.asarray(alone))  # the new one begins with no update


class NnxTwo(nnx.Module):
    def __init__(self, wide=64, last=20):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(16, wide, rngs=rngs)
        self.back = nnx.Linear(wide, 16, rngs=rngs)
        self.second = nnx.Linear(16, last, rngs=rngs)

    def __call__(self, x):
        return self.second(self.back(self.first(x)))


@pytest.mark.parametrize("sizes", [(64, 20), (20, 64), (16, 21)])
def test_another_adapter_beside_it_in_nnx(sizes):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    model = NnxTwo(*sizes)
    nnx.update(model, on(mesh, nnx.state(model)))
    rx.inject(model, {"a": CONFIG})
    values = rx.variables(model)
    rx.update(
        model, jax.device_put(values, rl.sharding(values, {"a": CONFIG}, bases_axes=["model"]))
    )
    before, y = model.randlora_B[...].sharding.spec, model(on(mesh, X))
    assert before[0] == "model"
    rx.insert(model, "b", OTHER)
    rx.set_active(model, None)
    B = model.randlora_B[...]
    assert B.sharding.spec[0] == ("model" if B.shape[0] % 2 == 0 else None)
    same(np.asarray(model(on(mesh, X))), np.asarray(y))
    # What is loaded is divided as the model's is.
    rx.update(model, here(rx.variables(model)))
    assert model.randlora_B[...].sharding.is_equivalent_to(B.sharding, 3)


def test_sizes_for_peft_where_a_kernel_can_be_read_in_two_ways(tmp_path):
    """Of (16, 4, 16) nothing tells the inputs: PEFT's sizes are those of either."""
    base = nn.MultiHeadDotProductAttention(num_heads=16, qkv_features=64)
    x = normal(0, 2, 3, 16)
    config = rl.RandLoraConfig(r=4, target_modules="all-linear")
    model = RandLora(base, config)
    variables = model.adapt(base.init(jax.random.key(0), x), x)
    names = {
        name: (name, f"kernel[{','.join('01' if name == 'out' else '0')}]")
        for name in ("query", "key", "value", "out")
    }
    rl.peft.save_adapter(tmp_path / "a", variables, config, names)
    _, adapter = rl.peft.files.read_adapter(tmp_path / "a", "default")
    shapes = {key: array.shape for key, array in adapter.bases.items()}
    assert shapes == {"randlora_A": (4, 1, 64), "randlora_B": (64, 16, 4)}
