"""A batch of which each row has its own adapter: it computes what each computes alone."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import randlora_jax as rl
from randlora_jax.linen import RandLora, quantize
from randlora_jax.ops import RandLoraDotGeneral, delta_weight
from tests.linen_cases import normal, quick_jit
from tests.mixing import CONFIG, CONFIGS, NAMES, Plain, Scanned, alone, expected, named, tokens

MODELS = {"compact": Plain(), "scan + remat along axis 1": Scanned(1)}


def close(actual, expected, tolerance=2e-6):
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def with_gradients(function, dy, *args):
    """Its result, and the gradients of its arguments."""
    y, pull = jax.vjp(function, *args)
    return y, *pull(dy)


@pytest.mark.parametrize("base", MODELS.values(), ids=MODELS)
def test_each_row_is_that_of_its_adapter_and_the_base_s_rows_have_its_bits(base):
    x = tokens()
    model, variables = named(base, x)
    mixed, table = rl.adapters.table(variables, CONFIGS, capacity=6)
    apply = jax.jit(RandLora(base, table.config).apply)
    y = apply(mixed, x, adapter_ids=table.ids(NAMES))
    close(y, expected(model, variables, x))
    plain = jax.jit(base.apply)({"params": variables["params"]}, x)
    np.testing.assert_array_equal(y[1], plain[1])
    # One for each token, and one for all.
    quick = quick_jit(RandLora(base, table.config).apply)
    each = jnp.broadcast_to(table.ids(NAMES)[:, None], x.shape[:2])
    close(quick(mixed, x, adapter_ids=each), y)
    close(quick(mixed, x, adapter_ids=table.ids("math")), alone(model, "math")(variables, x))


SHAPES = [(1, 7, 5, 2), (3, 5, 7, 3), (3, 8, 8, 8), (4, 6, 13, 9), (5, 16, 4, 1), (8, 12, 9, 4),
          (64, 6, 4, 2), (100, 9, 20, 3), (2, 30, 30, 4)]  # fmt: skip


FORCED = [(s, way) for s in SHAPES[1::3] for way in ("merged", "factored", "vectors")]


@pytest.mark.parametrize("shape, strategy", [*((s, "auto") for s in SHAPES), *FORCED], ids=str)
def test_rows_of_any_shape_and_their_gradients(shape, strategy):
    length, ins, outs, r = shape
    n, rows = -(-min(ins, outs) // r), 3
    A, B = normal(0, r, 1, min(ins, outs)), normal(1, max(ins, outs), n, r)
    lam, gamma = 0.3 * normal(2, rows, r, n), 0.3 * normal(3, rows, n, min(ins, outs))
    x, kernel, dy = (
        normal(4, rows, length, ins),
        normal(5, ins, outs),
        normal(6, rows, length, outs),
    )
    bases = {"randlora_A": A, "randlora_B": B}

    def ours(lam, gamma, x):
        operation = RandLoraDotGeneral(bases, [(lam, gamma)], strategy=strategy)
        return operation(x, kernel, (((2,), (0,)), ((), ())))

    def merged(lam, gamma, x):
        kernels = kernel[None] + delta_weight(A, B, lam, gamma, ins, outs, 1.0)
        return jnp.einsum("ati,aio->ato", x, kernels)

    found = (
        jax.jit(functools.partial(with_gradients, f, dy))(lam, gamma, x) for f in (ours, merged)
    )
    for one, other in zip(*found, strict=True):
        close(one, other)


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(1, 5), st.integers(1, 3)
)
@settings(max_examples=12, deadline=None)
def test_vectors_and_factors_are_one_function(ins, outs, r, tokens, adapters):
    n, low = -(-min(ins, outs) // r), min(ins, outs)
    bases = {"randlora_A": normal(0, r, 1, low), "randlora_B": normal(1, max(ins, outs), n, r)}
    scales = [(normal(2 + i, r, n), normal(9 + i, n, low)) for i in range(adapters)]
    x, kernel, dy = normal(4, tokens, ins), normal(5, ins, outs), normal(6, tokens, outs)

    def loss(scales, x, strategy):
        operation = RandLoraDotGeneral(bases, scales, strategy=strategy)
        return operation(x, kernel, (((1,), (0,)), ((), ())))

    ways = (functools.partial(loss, strategy=how) for how in ("vectors", "factored"))
    found = (with_gradients(way, dy, scales, x) for way in ways)
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        close(one, other)


def test_one_trace_serves_other_rows_and_other_entries():
    base, x, traces = Scanned(), tokens(), []
    _, variables = named(base, x)
    mixed, table = rl.adapters.table(variables, CONFIGS, capacity=4)
    model = RandLora(base, table.config)

    @jax.jit
    def apply(mixed, x, ids):
        traces.append(1)
        return model.apply(mixed, x, adapter_ids=ids)

    first = apply(mixed, x, table.ids(NAMES))
    other, known = rl.adapters.delete(mixed, table, "chat")
    added, config = rl.adapters.select(mixed, table, "math")
    other, known = rl.adapters.insert(other, known, "physics", added, config)
    second = apply(other, x, known.ids(["code", "__base__", "math", "physics", "code"]))
    assert len(traces) == 1 and apply._cache_size() == 1
    np.testing.assert_array_equal(second[:3], first[:3])
    close(second[3], apply(mixed, x, table.ids(["math"] * 5))[3])
    # An empty slot, and what is beyond the table, are the base: never a neighbour.
    empty, _ = rl.adapters.delete(other, known, "physics")
    for ids in ([0, -1, 4, -7, 3], [0, 3, 99, 2**31 - 1, -(2**31)]):
        y = apply(empty, x, jnp.array(ids, jnp.int32))
        plain = jax.jit(base.apply)({"params": variables["params"]}, x)
        np.testing.assert_array_equal(y[1:], plain[1:])


def test_an_entry_that_is_no_number_reaches_no_other_row():
    base, x = Plain(), tokens()
    _, variables = named(base, x)
    mixed, table = rl.adapters.table(variables, CONFIGS, capacity=3)
    apply = jax.jit(RandLora(base, table.config).apply)
    before = apply(mixed, x, adapter_ids=table.ids(NAMES))
    spoiled = jax.tree.map(
        lambda a: a.at[table.entries["chat"].slot].set(jnp.nan), mixed["randlora"]
    )
    y = apply({**mixed, "randlora": spoiled}, x, adapter_ids=table.ids(NAMES))
    assert np.isnan(y[3]).all()
    others = np.array([0, 1, 2, 4])
    np.testing.assert_array_equal(y[others], before[others])


def test_one_step_trains_every_row_s_adapter_as_one_at_a_time():
    base, x, names = Scanned(), tokens(4), ["chat", "math", "chat", "code"]
    model, variables = named(base, x)
    mixed, table = rl.adapters.table(variables, CONFIGS, capacity=5)
    apply, probe = RandLora(base, table.config).apply, normal(8, *x.shape)

    def together(scales):
        y = apply({**mixed, "randlora": scales}, x, adapter_ids=table.ids(names))
        return jnp.sum(y * probe)

    gradients = {**mixed, "randlora": quick_jit(jax.grad(together))(mixed["randlora"])}
    for name in CONFIGS:
        rows = np.array([i for i, n in enumerate(names) if n == name])

        def one(scales, name=name, rows=rows):
            given = {**variables, "randlora": {**variables["randlora"], name: scales}}
            return jnp.sum(model.clone(active=(name,)).apply(given, x[rows]) * probe[rows])

        wanted = quick_jit(jax.grad(one))(variables["randlora"][name])
        actual, _ = rl.adapters.select(gradients, table, name)
        jax.tree.map(lambda a, b: close(a, b, 1e-5), actual["randlora"], wanted)


def test_what_is_selected_is_what_was_inserted_with_its_layers_and_boxes():
    configs = {**CONFIGS, "late": CONFIG.replace(layers_to_transform=[2], layers_pattern="layers")}
    x = tokens()
    model, variables = named(Scanned(), x, configs)
    mixed, table = rl.adapters.table(variables, configs, capacity=4)
    for name, config in configs.items():
        one, its_config = rl.adapters.select(mixed, table, name)
        assert its_config == config
        jax.tree.map(np.testing.assert_array_equal, one["randlora"], variables["randlora"][name])
    apply = quick_jit(RandLora(Scanned(), table.config).apply)
    y = apply(mixed, x, adapter_ids=table.ids("late"))
    close(y, alone(model, "late")(variables, x))
    half = rl.adapters.with_strength(mixed, table, {"math": 0.5})
    weaker = rl.adapters.with_strength(variables, configs, {"math": 0.5})
    y = apply(half, x, adapter_ids=table.ids("math"))
    close(y, alone(model, "math")(weaker, x))


OTHERS = {
    "bfloat16": (lambda x: x.astype(jnp.bfloat16), CONFIGS, 0.05),
    "ternary int8 bases": (None, {n: c.replace(sparse=True) for n, c in CONFIGS.items()}, 2e-6),
}


@pytest.mark.parametrize("how", OTHERS)
def test_other_dtypes(how):
    cast, configs, tolerance = OTHERS[how]
    x = tokens() if cast is None else cast(tokens())
    base = nn.Dense(D_OUT, dtype=x.dtype, param_dtype=x.dtype)
    configs = {n: c.replace(target_modules="all-linear") for n, c in configs.items()}
    model, variables = named(base, x, configs)
    mixed, table = rl.adapters.table(variables, configs, capacity=3)
    y = jax.jit(RandLora(base, table.config).apply)(mixed, x, adapter_ids=table.ids(NAMES))
    assert y.dtype == x.dtype
    wanted = expected(model, variables, x)
    close(y.astype(jnp.float32), wanted.astype(jnp.float32), tolerance)


D_OUT = 9


def test_a_quantised_base():
    x, qtype = tokens(), "nf4"
    model, variables = named(Plain(), x)
    params = quantize(Plain(), {"params": variables["params"]}, x, qtype=qtype)["params"]
    mixed, table = rl.adapters.table({**variables, "params": params}, CONFIGS, capacity=3)
    y = quick_jit(RandLora(Plain(), table.config).apply)(mixed, x, adapter_ids=table.ids(NAMES))
    close(y, expected(model, {**variables, "params": params}, x), 1e-5)


def test_dropout_is_that_of_the_table_and_draws_for_each_row():
    base, x = nn.Dense(D_OUT), tokens()
    configs = {name: CONFIG for name in CONFIGS}
    _, variables = named(base, x, configs)
    kwargs = {"deterministic": False, "rngs": {"dropout": jax.random.key(3)}}
    mixed, table = rl.adapters.table(variables, configs, capacity=3, randlora_dropout=0.5)
    model = RandLora(base, table.config)
    y = model.apply(mixed, x, adapter_ids=table.ids(NAMES), **kwargs)
    one, config = rl.adapters.select(mixed, table, "math")
    dropped = RandLora(base, config.replace(randlora_dropout=0.5)).apply(one, x, **kwargs)
    close(y[2], dropped[2])
    off = model.apply(mixed, x, adapter_ids=table.ids(NAMES), deterministic=True)
    assert np.abs(off - y).max() > 1e-3


def test_under_vmap_each_example_has_its_number():
    base, x = Plain(), tokens()
    _, variables = named(base, x)
    mixed, table = rl.adapters.table(variables, CONFIGS, capacity=3)
    apply = lambda x, i: RandLora(base, table.config).apply(mixed, x[None], adapter_ids=i)[0]
    y = jax.jit(jax.vmap(apply))(x, table.ids(NAMES))
    together = quick_jit(RandLora(base, table.config).apply)
    close(y, together(mixed, x, adapter_ids=table.ids(NAMES)))


def test_a_stack_inside_a_layer_takes_rows_where_they_are_tokens():
    x = normal(0, 4, 3, 6)  # (rows, heads, features)
    base = nn.Einsum((3, 6, 7), "bhd,hdk->bhk", use_bias=False)
    model, variables = named(base, x, {n: CONFIG for n in CONFIGS})
    mixed, table = rl.adapters.table(variables, {n: CONFIG for n in CONFIGS}, capacity=3)
    apply = RandLora(base, table.config).apply
    names = ["chat", "__base__", "math", "code"]
    y = quick_jit(apply)(mixed, x, adapter_ids=table.ids(names))
    close(y, expected(model, variables, x, names))
    experts = nn.Einsum((3, 6, 7), "ecd,edf->ecf", use_bias=False)
    dispatched = normal(0, 3, 4, 6)
    model, variables = named(experts, dispatched, {"chat": CONFIG})
    mixed, table = rl.adapters.table(variables, {"chat": CONFIG}, capacity=3)
    apply = RandLora(experts, table.config).apply
    with pytest.raises(ValueError, match=r"\(3,\).*\(3, 4, 6\)"):
        apply(mixed, dispatched, adapter_ids=table.ids(["chat"] * 3))
    close(
        apply(mixed, dispatched, adapter_ids=table.ids("chat")), model.apply(variables, dispatched)
    )
