"""A quantised base on meshes: codes and scales are divided like their kernels, and stay so."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import randlora_jax as rl
from randlora_jax import trees
from randlora_jax.linen import RandLora, quantize
from randlora_jax.nnx import inject, set_layout
from randlora_jax.nnx import quantize as quantize_nnx
from randlora_jax.nnx import variables as variables_of
from tests.compiling import shipped_jit
from tests.linen_cases import normal, randomised
from tests.pods import exchanged
from tests.quantised_models import CONFIG, NnxModel, X, as_floats, equal, kernels

# Kernel specs of up (in < out) and down (out < in).
LAYOUTS = {
    "data": (P(), P()),
    "fsdp": (P("data", None), P("data", None)),
    "tensor": (P(None, "model"), P("model", None)),
    "fsdp+tensor": (P("data", "model"), P("model", "data")),
}
TYPES = {
    "int8": {"qtype": "int8"},
    "nf4": {"qtype": "nf4", "tile_size": 16},
    "nf4, tiles that are cut": {"qtype": "nf4", "tile_size": 32},
}
BATCH = normal(2, 8, 16, 64)


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


class NoBias(nn.Module):
    @nn.compact
    def __call__(self, x):
        up = nn.Dense(128, use_bias=False, name="up")
        return nn.Dense(64, use_bias=False, name="down")(nn.tanh(up(x)))


@functools.cache
def base():
    return NoBias().init(jax.random.key(0), BATCH)["params"]


def placed(layout, kind, how):
    """(mesh, variables over codes, over floats, batch), where `rl.sharding` says."""
    mesh = mesh_of(kind)
    put = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
    specs = dict(zip(("up", "down"), LAYOUTS[layout], strict=True))
    params = {n: {"kernel": put(base()[n]["kernel"], spec)} for n, spec in specs.items()}
    quantised = quantize(NoBias(), {"params": params}, BATCH, **how)
    model = RandLora(NoBias(), CONFIG)
    variables = model.adapt(quantised, BATCH)
    variables["randlora"] = randomised(variables["randlora"])
    variables = jax.device_put(variables, rl.sharding(variables, CONFIG, mesh))
    whole = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), variables)
    floats = jax.tree.map(
        lambda a, like: put(a, like.sharding.spec), as_floats(whole["params"]), params
    )
    batch = put(BATCH, P(("data", "model") if layout == "data" else "data"))
    return mesh, model, variables, {**variables, "params": floats}, batch


def step(model):
    def loss(trainable, frozen, x):
        return jnp.mean(model.apply(rl.combine(trainable, frozen), x) ** 2)

    return jax.value_and_grad(loss, (0, 2))


@pytest.mark.parametrize("how", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_and_scales_are_divided_like_their_kernels(layout, how):
    _, _, variables, floats, _ = placed(layout, AxisType.Auto, how)
    alone = quantize(NoBias(), {"params": base()}, BATCH, **how)
    for name, array in kernels(variables["params"]).items():
        kernel = trees.get(floats["params"], tuple(name.split("."))).sharding.spec
        assert array.qvalue.sharding.spec == kernel or not any(kernel)
        divided = zip(array.scale.shape, array.scale.sharding.spec, kernel, strict=False)
        for count, own, wanted in divided:
            parts = {None: 1, "data": 4, "model": 2}[wanted]
            assert own == (wanted if count % parts == 0 else None)
        assert equal(array, trees.get(alone["params"], tuple(name.split("."))))


@pytest.mark.parametrize(
    ("layout", "how"),
    [(layout, "nf4") for layout in LAYOUTS]
    + [("fsdp+tensor", "int8"), ("fsdp+tensor", "nf4, tiles that are cut")],
)
@pytest.mark.parametrize("way", ["compiler", "told", "types"])
def test_a_step_is_that_of_one_device_and_exchanges_no_more_than_over_floats(way, layout, how):
    kind = AxisType.Explicit if way == "types" else AxisType.Auto
    mesh, model, variables, floats, x = placed(layout, kind, TYPES[how])
    if way == "told":
        model = model.with_layout(variables, x)
    moved, results = [], []
    with jax.set_mesh(mesh):
        for one in (variables, floats):
            run = shipped_jit(step(model))
            compiled = run.lower(*rl.split(one, CONFIG), x).compile()
            moved.append(sum(exchanged(compiled).values()))
            results.append(run(*rl.split(one, CONFIG), x))
    alone, x = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), (variables, x))
    expected = jax.jit(step(RandLora(NoBias(), CONFIG)))(*rl.split(alone, CONFIG), x)
    for result in results:
        for got, wanted in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
            atol = 1e-5 * float(jnp.abs(wanted).max())
            np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=1e-4, atol=atol)
    scales = sum(a.scale.nbytes for a in kernels(variables["params"]).values())
    assert moved[0] <= moved[1] + scales


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_a_model_of_which_a_part_is_adapted_is_exported(how):
    """Layers without an update need no callback of the compiler either."""
    _, _, variables, _, x = placed("fsdp+tensor", AxisType.Auto, TYPES[how])
    config = CONFIG.replace(target_modules=["up"])
    variables = {**variables, "randlora": {"up": variables["randlora"]["up"]}}
    model = RandLora(NoBias(), config).with_layout(variables, x)
    expected = jax.jit(model.apply)(variables, x)
    exported = jax.export.export(jax.jit(model.apply))(variables, x)
    y = jax.jit(exported.call)(variables, x)
    np.testing.assert_allclose(np.asarray(y), np.asarray(expected), rtol=1e-5, atol=1e-4)
    alone, tokens = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), (variables, x))
    one = jax.jit(RandLora(NoBias(), config).apply)(alone, tokens)
    np.testing.assert_allclose(np.asarray(y), np.asarray(one), rtol=1e-4, atol=1e-3)


def test_an_nnx_model_of_which_a_part_is_adapted_is_exported():
    mesh = mesh_of(AxisType.Auto)
    put = lambda value, *spec: jax.device_put(value, NamedSharding(mesh, P(*spec)))
    model = NnxModel(nnx.Rngs(0))
    nnx.update(model, jax.tree.map(put, nnx.state(model, nnx.Param)))
    inject(quantize_nnx(model, **TYPES["nf4"]), CONFIG.replace(target_modules=["up"]))
    x = put(jnp.concatenate([X, X]), "data")
    y = nnx.jit(lambda model, x: model(x))(model, x)
    set_layout(model, x)
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    exported = jax.export.export(run)(state, x)
    np.testing.assert_allclose(jax.jit(exported.call)(state, x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_merging_and_requantising_keep_the_division(kind):
    _, model, variables, floats, _ = placed("fsdp+tensor", kind, TYPES["nf4"])
    merged = model.merge(variables)
    for name in ("up", "down"):
        assert merged[name]["kernel"].sharding == floats["params"][name]["kernel"].sharding
        expected = model.merge(floats)[name]["kernel"]
        np.testing.assert_array_equal(np.asarray(merged[name]["kernel"]), np.asarray(expected))
    with pytest.warns(UserWarning, match="rounded to nf4"):
        again = model.merge(variables, requantize=True)
    for name, array in kernels(again).items():
        old = kernels(variables["params"])[name]
        assert array.qvalue.sharding == old.qvalue.sharding
        assert array.scale.sharding == old.scale.sharding


def test_abstract_kernels_get_the_shardings_that_real_ones_get():
    mesh = mesh_of(AxisType.Auto)
    params = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=NamedSharding(mesh, P("data", "model"))
        ),
        {"params": base()},
    )
    abstract = quantize(NoBias(), params, BATCH, **TYPES["nf4"])["params"]
    assert abstract["up"]["kernel"].scale.sharding.spec == P("data", "model")
    real = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), {"params": base()}, params)
    run = lambda p: quantize(NoBias(), p, BATCH, **TYPES["nf4"])["params"]
    assert jax.tree.map(lambda a: (a.shape, a.sharding.spec), run(real)) == jax.tree.map(
        lambda a: (a.shape, a.sharding.spec), abstract
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_nnx_models(kind):
    mesh = mesh_of(kind)
    model = NnxModel(nnx.Rngs(0))
    alone = inject(quantize_nnx(NnxModel(nnx.Rngs(0)), **TYPES["nf4"]), CONFIG)
    put = lambda value, *spec: jax.device_put(value, NamedSharding(mesh, P(*spec)))
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param):
            value = variable.get_value()
            spec = (None, None, "model") if value.shape == (3, 64, 128) else ()
            variable.set_value(put(value, *spec))
    quantize_nnx(model, **TYPES["nf4"])
    assert model.blocks.up.kernel.get_value().scale.sharding.spec == P(None, None, "model")
    inject(model, CONFIG)
    with jax.set_mesh(mesh):
        y = nnx.jit(lambda model, x: model(x))(model, put(X))
    np.testing.assert_allclose(np.asarray(y), np.asarray(alone(X)), rtol=1e-4, atol=1e-4)
    shardings = rl.sharding(variables_of(model), CONFIG)
    assert jax.tree.leaves(jax.device_put(variables_of(model), shardings))


def test_the_summary_counts_what_a_device_holds():
    _, _, variables, _, _ = placed("fsdp+tensor", AxisType.Auto, TYPES["nf4"])
    codes = 2 * 64 * 128
    size = (codes // 2 + codes // 16 * 4) // 8
    assert f"on each of 8          base {size / 1000:.3f} kB" in rl.summary(variables, CONFIG)
