"""Every way of nesting layers: the base stays as it is, and its layers compute with W + dW."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tests import linen_cases
from tests.compiling import shipped_jit
from tests.linen_cases import (
    Case,
    as_numpy,
    assert_close,
    assert_same_bits,
    normal,
)
from tests.linen_models import (
    PLAIN,
    Block,
    Boxed,
    BoxedScan,
    Scan,
    ScanBroadcast,
    ScanLayer,
    Setup,
    Shared,
    SharesScope,
    Within,
    block_kernels,
)

X, XS = normal(0, 4, 5), normal(0, 3, 4, 5)


def vmapped(cls, axis=0):
    return nn.vmap(cls, variable_axes={"params": axis}, split_rngs={"params": True})


def scan_of_scan(axis):
    return Scan(lambda name: Scan(length=2, name=name), axis=axis)


CASES = {
    "compact": Case(Block(), (X,), block_kernels()),
    "setup": Case(Setup(), (X,), block_kernels()),
    "a module called several times": Case(Setup(3), (X,), block_kernels()),
    "a module in two parents": Case(Shared(), (X,), {"common/kernel": ((0,), ())}),
    "share_scope": Case(SharesScope(), (X,), {"up/kernel": ((0,), ()), "own/kernel": ((0,), ())}),
    "Sequential": Case(
        nn.Sequential([nn.Dense(7), nn.tanh, nn.Dense(5)]),
        (X,),
        {"layers_0/kernel": ((0,), ()), "layers_2/kernel": ((0,), ())},
    ),
    "remat of a bare layer": Case(nn.remat(nn.Dense)(7), (X,), PLAIN),
    "remat of a block": Case(Within(nn.remat(Block)), (X,), block_kernels("inner/")),
    "vmap of a bare layer": Case(vmapped(nn.Dense)(7), (XS,), {"kernel": ((0,), (0,))}),
    "vmap of a bare layer, axis -1": Case(
        vmapped(nn.Dense, -1)(7), (XS,), {"kernel": ((0,), (-1,))}
    ),
    "vmap over the input alone": Case(
        nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})(7),
        (XS,),
        PLAIN,
    ),
    "vmap of a block": Case(vmapped(Block)(), (XS,), block_kernels(stack=(0,))),
    "scan of a bare layer": Case(ScanLayer(), (X,), {"layer/kernel": ((0,), (0,))}),
    "scan of a block": Case(Scan(), (X,), block_kernels("layers/inner/", (0,))),
    "scan, axis 1": Case(Scan(axis=1), (X,), block_kernels("layers/inner/", (1,))),
    "scan, axis -1": Case(Scan(axis=-1), (X,), block_kernels("layers/inner/", (-1,))),
    "scan of the same parameters": Case(ScanBroadcast(), (X,), block_kernels("layers/inner/")),
    "scan of remat": Case(Scan(lift=nn.remat), (X,), block_kernels("layers/inner/", (0,))),
    "scan of scan": Case(
        scan_of_scan(0), (X,), block_kernels("layers/inner/layers/inner/", (0, 0))
    ),
    "scan of scan, outer axis 1": Case(
        scan_of_scan(1), (X,), block_kernels("layers/inner/layers/inner/", (1, 0))
    ),
    "vmap of scan": Case(vmapped(Scan)(), (XS,), block_kernels("layers/inner/", (0, 0))),
    "scan of vmap": Case(Scan(vmapped(Block)), (XS,), block_kernels("layers/inner/", (0, 0))),
    "remat_scan": Case(
        Within(nn.remat_scan(Block, lengths=(2, 3))), (X,), block_kernels("inner/", (0, 0))
    ),
    "RNN": Case(
        nn.RNN(nn.SimpleCell(7, name="cell")),
        (XS,),
        {"cell/i/kernel": ((0,), ()), "cell/h/kernel": ((0,), ())},
        exact=nn.RNN(nn.SimpleCell(7, name="cell", param_dtype=jnp.float64)),
    ),
    "boxed kernels": Case(Boxed(), (X,), block_kernels()),
    "boxed kernels in a scan": Case(BoxedScan(), (X,), block_kernels("layers/inner/", (0,))),
}


# For each case below.
test_the_base_has_the_paths_and_initial_values_of_the_unwrapped_model = (
    linen_cases.test_the_base_has_the_paths_and_initial_values_of_the_unwrapped_model
)
test_output_is_bit_identical_before_training = (
    linen_cases.test_output_is_bit_identical_before_training
)
test_output_is_that_of_kernel_plus_update = linen_cases.test_output_is_that_of_kernel_plus_update
test_gradients_are_those_of_kernel_plus_update = (
    linen_cases.test_gradients_are_those_of_kernel_plus_update
)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_adapting_gives_what_init_gives_and_holds_the_very_arrays_of_the_base(case):
    given, kept = (jax.tree.leaves(v["params"]) for v in (case.base_variables, case.adapted))
    assert all(a is b for a, b in zip(given, kept, strict=True))
    assert_same_bits(case.adapted, case.variables)


def test_the_bases_are_one_pair_at_the_root(case):
    assert {k: v.ndim for k, v in case.variables["randlora_bases"].items()} == {
        "randlora_A": 3,
        "randlora_B": 3,
    }


STACKS = [
    "vmap of a bare layer, axis -1",
    "scan, axis -1",
    "scan of scan, outer axis 1",
    "remat_scan",
]


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_merges_into_what_it_computed(name):
    case = CASES[name]
    params = case.model.merge(case.trained, *case.args)
    y = case.base.apply({"params": params}, *case.args)
    assert_close(as_numpy(y), case.expected[0], case.tolerance)


@pytest.mark.parametrize("name", ["scan of remat", "vmap of a bare layer", "boxed kernels"])
def test_output_is_bit_identical_before_training_under_jit(name):
    case = CASES[name]
    y = shipped_jit(case.model.apply)(case.variables, *case.args)
    assert_same_bits(y, shipped_jit(case.base.apply)(case.base_variables, *case.args))


def test_checkpointed_gradients_are_the_same():
    case = CASES["scan of remat"]

    def loss(scales):
        return jnp.sum(jnp.sin(case.model.apply({**case.trained, "randlora": scales}, X)))

    plain, again = (jax.jit(jax.grad(f)) for f in (loss, jax.checkpoint(loss)))
    scales = case.trained["randlora"]
    assert_close(as_numpy(again(scales)), as_numpy(plain(scales)), 1e-6)


@pytest.mark.parametrize("name", ["scan of scan", "boxed kernels in a scan", "Sequential"])
def test_eval_shape_of_init_gives_the_shapes_of_init_and_no_array(name):
    case = CASES[name]
    shapes = jax.eval_shape(case.model.init, jax.random.key(0), *case.args)
    as_struct = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
    assert jax.tree.map(as_struct, shapes) == jax.tree.map(as_struct, case.variables)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))


def test_adapting_needs_no_more_than_the_shapes_of_the_base():
    case = CASES["scan of remat"]
    params = jax.eval_shape(lambda: case.base_variables["params"])
    adapted = case.model.adapt({"params": params}, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert_same_bits(adapted["randlora"], case.variables["randlora"])
    assert adapted["params"] == params


def test_initialising_outside_jit_gives_what_adapting_gives():
    case = CASES["scan of a block"]
    expected = case.base.init(jax.random.key(4), X)
    variables = case.model.init(jax.random.key(4), X)
    assert_same_bits(variables["params"], expected["params"])
    assert_same_bits(variables, case.model.adapt(expected, X))


def test_scales_are_in_boxes_as_their_kernels_and_whole():
    case = CASES["boxed kernels"]
    names = lambda layer, scale: case.variables["randlora"][layer][f"randlora_{scale}"].names
    assert names("up", "gamma") == names("down", "gamma") == (None, None)
    assert names("up", "lambda") == names("down", "lambda") == (None, None)
    boxes = {k: type(v["randlora_gamma"]) for k, v in case.variables["randlora"].items()}
    assert boxes == {"up": nn.Partitioned, "down": nn.LogicallyPartitioned}


def test_scales_of_a_stack_have_the_name_of_its_axis_too():
    specs = nn.get_partition_spec(CASES["boxed kernels in a scan"].variables["randlora"])
    inner = specs["layers"]["inner"]
    for layer in ("up", "down"):
        for scale in ("gamma", "lambda"):
            assert inner[layer][f"randlora_{scale}"] == jax.P("layers", None, None)


def test_boxes_can_be_taken_off():
    case = CASES["boxed kernels in a scan"]
    y = case.model.apply(nn.unbox(case.trained), X)
    assert_same_bits(y, case.model.apply(case.trained, X))


def test_merging_keeps_boxes():
    case = CASES["boxed kernels"]
    merged = case.model.merge(case.trained)
    assert jax.tree.structure(merged) == jax.tree.structure(case.variables["params"])
