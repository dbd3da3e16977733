"""What an adapter adds to what devices exchange: read in the compiled HLO, on 8 devices."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import randlora_jax as rl
from randlora_jax.linen import RandLora
from tests.compiling import shipped_jit
from tests.pods import exchanged

CONFIG = rl.RandLoraConfig(r=8, randlora_alpha=8, target_modules="all-linear")
# Kernel specs of up (in < out) and down (out < in).
LAYOUTS = {
    "data": (P(), P()),
    "fsdp": (P("data", None), P("data", None)),
    "tensor": (P(None, "model"), P("model", None)),
    "fsdp+tensor": (P("data", "model"), P("model", "data")),
}


class Stack(nn.Module):
    """Three blocks; with `out_sharding`-less products, so the partitioner decides about sums."""

    layers: int = 3

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            h = nn.Dense(128, use_bias=False, name=f"up_{i}")(x)
            x = x + nn.Dense(64, use_bias=False, name=f"down_{i}")(nn.gelu(h))
        return x


@functools.cache
def single_device():
    """(variables, x, loss and gradients of the scales) without a mesh."""
    x = jax.random.normal(jax.random.key(1), (8, 16, 64))
    params = Stack().init(jax.random.key(0), x)["params"]
    variables = RandLora(Stack(), CONFIG).adapt({"params": params}, x)
    keys = iter(jax.random.split(jax.random.key(2), 99))
    noisy = lambda a: a + 0.05 * jax.random.normal(next(keys), a.shape)
    variables["randlora"] = jax.tree.map(noisy, variables["randlora"])
    return variables, x, jax.jit(step("auto"))(*rl.split(variables, CONFIG), x)


def step(strategy):
    model = RandLora(Stack(), CONFIG, strategy=strategy)

    def loss(trainable, frozen, x):
        return jnp.mean(model.apply(rl.combine(trainable, frozen), x) ** 2)

    return jax.value_and_grad(loss)


def base_step(x, frozen):
    loss = lambda x: jnp.mean(Stack().apply({"params": frozen["params"]}, x) ** 2)
    return jax.value_and_grad(loss)(x)


def placed(layout, kind):
    """(mesh, trainable, frozen, x) divided as the layout says."""
    variables, x, _ = single_device()
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    up, down = LAYOUTS[layout]
    trainable, frozen = rl.split(variables, CONFIG)
    put = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
    of = lambda path: up if path[0].key.startswith("up") else down
    kernels = jax.tree_util.tree_map_with_path(lambda p, a: put(a, of(p)), frozen["params"])
    whole = jax.tree.map(lambda a: put(a, P()), (trainable, frozen["randlora_bases"]))
    frozen = {"params": kernels, "randlora_bases": whole[1]}
    return mesh, whole[0], frozen, put(x, P(("data", "model") if layout == "data" else "data"))


@pytest.mark.parametrize("data_axes", [None, ("data",)], ids=["whole", "model"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_automatic_axes_exchange_what_explicit_ones_do(layout, data_axes):
    """Where `sharding` puts the scales: a gamma that is divided is fetched, and nothing else."""
    moved = {}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh, trainable, frozen, x = placed(layout, kind)
        variables = rl.combine(trainable, frozen)
        shardings = rl.sharding(variables, CONFIG, mesh, data_axes=data_axes)
        trainable, frozen = rl.split(jax.device_put(variables, shardings), CONFIG)
        with jax.set_mesh(mesh):
            compiled = shipped_jit(step("factored")).lower(trainable, frozen, x).compile()
        moved[kind] = exchanged(compiled)
    assert moved[AxisType.Auto] == moved[AxisType.Explicit]


@pytest.mark.parametrize("strategy", ["merged", "factored"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_scales_gradients_are_exchanged_besides_what_the_base_exchanges(layout, strategy):
    """With explicit axes; automatic ones are in test_layouts.py, and exchange the same."""
    mesh, trainable, frozen, x = placed(layout, AxisType.Explicit)
    with jax.set_mesh(mesh):
        compiled = shipped_jit(step(strategy)).lower(trainable, frozen, x).compile()
        result = compiled(trainable, frozen, x)
    # With explicit axes a plain Dense refuses to sum over a divided kernel: the base is compared
    # where it runs.
    auto = placed(layout, AxisType.Auto)
    with jax.set_mesh(auto[0]):
        base = exchanged(shipped_jit(base_step).lower(auto[3], auto[2]).compile())
    ours = exchanged(compiled)
    scales = sum(a.nbytes for a in jax.tree.leaves(trainable))
    beyond = sum(ours.values()) - sum(base.values())
    assert beyond <= 1.1 * scales
    if layout == "data":
        assert scales <= sum(ours.values()) <= 1.1 * scales
    for got, expected in zip(
        jax.tree.leaves(result), jax.tree.leaves(single_device()[2]), strict=True
    ):
        tolerance = 1e-5 * float(jnp.abs(expected).max())
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=1e-4, atol=tolerance)


def test_the_kernel_can_be_trained_too_and_its_gradient_is_as_it_is_divided():
    variables, x, _ = single_device()
    model = RandLora(Stack(), CONFIG)
    loss = lambda v, x: jnp.mean(model.apply(v, x) ** 2)
    expected = jax.grad(loss, allow_int=True)(variables, x)["params"]
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh, trainable, frozen, placed_x = placed("fsdp+tensor", kind)
        with jax.set_mesh(mesh):
            got = jax.jit(jax.grad(loss))(rl.combine(trainable, frozen), placed_x)["params"]
        for path, leaf in jax.tree_util.tree_leaves_with_path(got):
            reference = expected[path[0].key][path[1].key]
            np.testing.assert_allclose(np.asarray(leaf), reference, rtol=1e-4, atol=1e-6)


def test_an_uneven_division_is_left_alone():
    x = jax.random.normal(jax.random.key(1), (6, 10))  # 8 devices divide neither side
    model = RandLora(nn.Dense(14), CONFIG)
    variables = model.init(jax.random.key(0), x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        y = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(y, model.apply(variables, x), rtol=1e-5, atol=1e-6)


def test_shardings_follow_the_kernels():
    _, trainable, frozen, _ = placed("fsdp+tensor", AxisType.Auto)
    tree = rl.sharding(rl.combine(trainable, frozen), CONFIG, data_axes=["data"])
    specs = jax.tree.map(lambda s: s.spec, tree)
    assert specs["params"]["up_0"]["kernel"] == P("data", "model")
    # up: the input is the smaller side, divided by data alone; down: the output, likewise.
    assert specs["randlora"]["up_0"]["randlora_gamma"] == P(None, None)
    _, trainable, frozen, _ = placed("tensor", AxisType.Auto)
    square = rl.sharding(rl.combine(trainable, frozen), CONFIG, data_axes=[])
    assert square["randlora"]["up_0"]["randlora_gamma"].spec == P(None, None)
    assert square["randlora_bases"]["randlora_B"].spec == P()


def test_shardings_of_gamma_take_the_axis_of_the_side_it_scales():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x = jnp.ones((2, 16))
    model = RandLora(nn.Dense(8), CONFIG)  # out < in: gamma scales the outputs
    variables = jax.jit(model.init)(jax.random.key(0), x)
    spec = NamedSharding(mesh, P("data", "model"))
    variables["params"]["kernel"] = jax.device_put(variables["params"]["kernel"], spec)
    assert rl.sharding(variables, CONFIG)["randlora"]["randlora_gamma"].spec == P(None, None)
    shardings = rl.sharding(variables, CONFIG, data_axes=[])
    assert shardings["randlora"]["randlora_gamma"].spec == P(None, "model")
    assert shardings["randlora"]["randlora_lambda"].spec == P(None, None)
    moved = jax.device_put(variables, shardings)
    np.testing.assert_allclose(
        jax.jit(model.apply)(moved, x), model.apply(variables, x), rtol=1e-5, atol=1e-6
    )


def test_each_device_draws_its_own_part_of_the_bases():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = {"randlora_A": P(None, None, "data"), "randlora_B": P("data")}
    out = {name: NamedSharding(mesh, s) for name, s in spec.items()}
    draw = shipped_jit(lambda: rl.draw_bases(CONFIG, 128, 64), out_shardings=out)
    assert sum(exchanged(draw.lower().compile()).values()) == 0
    for name, array in rl.draw_bases(CONFIG, 128, 64).items():
        np.testing.assert_array_equal(draw()[name], array)
