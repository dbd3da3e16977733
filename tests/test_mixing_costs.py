"""What few tokens, and rows with adapters of their own, cost: as XLA counts, no clocks."""

import functools

import jax
import jax.numpy as jnp
import pytest

from randlora_jax.ops import RandLoraDotGeneral
from randlora_jax.ops.costs import cheapest, product_flops
from tests.compiling import shipped_jit

DIMS = (((1,), (0,)), ((), ()))
f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)


def operands(tokens, ins, outs, r, rows=()):
    small, large = sorted((ins, outs))
    n = -(-small // r)
    bases = {"randlora_A": f32(r, 1, small), "randlora_B": f32(large, n, r)}
    return bases, (f32(*rows, r, n), f32(*rows, n, small)), f32(tokens, ins), f32(ins, outs)


def ours(bases, scales, x, kernel, strategy="auto"):
    return RandLoraDotGeneral(bases, [scales], strategy=strategy)(x, kernel, DIMS)


def compiled(function, *args):
    found = shipped_jit(function).lower(*args).compile()
    costs = found.cost_analysis()
    return costs["bytes accessed"], costs["flops"], found.memory_analysis().temp_size_in_bytes


def with_gradients(function, argnums):
    def run(dy, *args):
        return jax.value_and_grad(lambda *args: jnp.sum(function(*args) * dy), argnums)(*args)

    return run


@pytest.mark.parametrize("sizes", [(2048, 2048), (576, 1536), (1536, 576), (2048, 512)], ids=str)
def test_one_token_costs_twice_the_bytes_of_the_frozen_layer_and_no_memory(sizes):
    bases, scales, x, kernel = operands(1, *sizes, 32)
    dy = f32(1, sizes[1])
    forward = compiled(ours, bases, scales, x, kernel)
    frozen = compiled(jnp.matmul, x, kernel)
    assert forward[0] <= 2.2 * frozen[0]
    both = compiled(with_gradients(ours, (1, 2)), dy, bases, scales, x, kernel)
    frozen = compiled(with_gradients(jnp.matmul, 0), dy, x, kernel)
    assert both[0] <= 2.2 * frozen[0]
    assert max(forward[2], both[2]) <= 1e6


def test_the_bytes_of_factors_are_those_that_vectors_avoid():
    given = operands(1, 2048, 2048, 32)
    factored = compiled(functools.partial(ours, strategy="factored"), *given)
    assert factored[0] > 1.8 * compiled(ours, *given)[0]
    assert factored[2] > 15e6


@pytest.mark.parametrize("sizes", [(576, 1536), (1536, 576)], ids=str)
def test_thirty_two_rows_need_no_factor_of_their_own(sizes):
    bases, scales, x, kernel = operands(32, *sizes, 32, (32,))
    each, _, temp = compiled(ours, bases, scales, x, kernel)
    mapped = lambda b, s, x, k: jax.vmap(
        lambda s, x: ours(b, s, x[None], k, "factored"), (0, 0)
    )(s, x)  # fmt: skip
    assert temp <= 2e6
    assert compiled(mapped, bases, scales, x, kernel)[2] > 15 * temp
    assert each <= 5 * compiled(jnp.matmul, x, kernel)[0]


GRID = [(1, 256, 256, 8), (4, 256, 1024, 32), (8, 1024, 256, 32), (16, 512, 512, 32),
        (24, 1024, 256, 8), (31, 512, 256, 64)]  # fmt: skip


@pytest.mark.parametrize("point", GRID, ids=str)
def test_vectors_take_no_more_operations_than_factors(point):
    tokens, ins, outs, r = point
    m = -(-min(ins, outs) // r) * r
    assert cheapest(*point[:3], (r, m // r)) == ("vectors", "vectors")
    bases, scales, x, kernel = operands(*point)
    both = with_gradients(ours, (1, 2))
    flops = compiled(both, f32(tokens, outs), bases, scales, x, kernel)[1]
    formula = sum(product_flops(tokens, ins, outs, m, "factored", "factored"))
    assert flops <= 1.05 * formula + 8 * m * min(ins, outs)


def test_the_border_is_where_their_intermediate_outgrows_the_factor():
    for r, n in ((32, 64), (64, 32), (8, 8)):
        sizes = 2048, 2048, (r, n)
        assert cheapest(max(r, n) - 1, *sizes)[0] == "vectors"
        assert cheapest(max(r, n), *sizes)[0] == "factored"
    # Of several adapters the factor is built once, so vectors pay for fewest tokens alone.
    assert cheapest(1, 2048, 2048, (32, 64), adapters=3)[0] == "vectors"
    assert cheapest(2, 2048, 2048, (32, 64), adapters=3)[0] == "factored"
    assert cheapest(10**6, 2048, 2048, (32, 64), "unmerged") == ("factored", "factored")
