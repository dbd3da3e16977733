"""What a quantised base costs, as XLA counts it: against the same base in floats, and qwix's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import qwix

import randlora_jax as rl
from randlora_jax.linen import RandLora, quantize
from tests.compiling import shipped_jit
from tests.quantised_models import as_floats

WIDTH, TOKENS = 512, 32
KERNEL = WIDTH * WIDTH * 4
CONFIG = rl.RandLoraConfig(r=8, target_modules="all-linear")
TYPES = {"int8": {"qtype": "int8"}, "nf4": {"qtype": "nf4", "tile_size": 64}}


class Layers(nn.Module):
    count: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.count):
            x = nn.tanh(nn.Dense(WIDTH, name=f"layer_{i}")(x))
        return x


class Einsums(Layers):
    @nn.compact
    def __call__(self, x):
        for i in range(self.count):
            x = nn.tanh(nn.Einsum((WIDTH, WIDTH), "ti,io->to", name=f"layer_{i}")(x))
        return x


X = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)


@functools.cache
def compiled(kind, count, strategy="auto", targets="all-linear", how="nf4", base=Layers):
    """A training step's executable: "quantised", "floats", or "qwix", its LoRA."""
    base = base(count)
    params = jax.eval_shape(base.init, jax.random.key(0), X)
    if kind == "qwix":
        rule = qwix.LoraRule(
            module_path=".*",
            weight_qtype=TYPES[how]["qtype"],
            tile_size=TYPES[how].get("tile_size"),
            rank=8,
            alpha=8,
        )
        model = qwix.apply_lora_to_model(base, qwix.LoraProvider([rule]))
        variables = jax.eval_shape(model.init, jax.random.key(0), X)
        is_lora = lambda path: "lora" in jax.tree_util.keystr(path)
        flat, tree = jax.tree_util.tree_flatten_with_path(variables)
        trains = [leaf for path, leaf in flat if is_lora(path)]
        frozen = [leaf for path, leaf in flat if not is_lora(path)]

        def apply(trains, frozen, x):
            new, old = iter(trains), iter(frozen)
            leaves = [next(new) if is_lora(path) else next(old) for path, _ in flat]
            return model.apply(jax.tree.unflatten(tree, leaves), x)
    else:
        quantised = quantize(base, params, X, **TYPES[how])
        if kind == "floats":
            quantised = {"params": jax.eval_shape(as_floats, quantised["params"])}
        config = CONFIG.replace(target_modules=targets)
        model = RandLora(base, config, strategy=strategy)
        trains, frozen = rl.split(jax.eval_shape(model.adapt, quantised, X), config)
        apply = lambda t, f, x: model.apply(rl.combine(t, f), x)
    loss = lambda t, x, f: jnp.mean(jnp.square(apply(t, f, x)))
    return shipped_jit(jax.value_and_grad(loss, (0, 1))).lower(trains, X, frozen).compile()


def kept_by_layer(*given, **options):
    """Kernels of float32 that a step keeps for one more layer."""
    size = lambda n: compiled(given[0], n, *given[1:], **options).memory_analysis()
    return (size(8).temp_size_in_bytes - size(4).temp_size_in_bytes) / 4 / KERNEL


@pytest.mark.parametrize("how", TYPES)
@pytest.mark.parametrize("strategy", ["merged", "factored"])
def test_it_keeps_for_each_layer_what_the_float_base_keeps(strategy, how):
    ours = kept_by_layer("quantised", strategy, how=how)
    assert ours <= kept_by_layer("floats", strategy, how=how) + 0.02
    assert kept_by_layer("qwix", how=how) > 0.9  # a float kernel


@pytest.mark.parametrize("base", [Layers, Einsums])
@pytest.mark.parametrize("how", TYPES)
def test_layers_without_an_update_keep_no_floats_either(how, base):
    assert kept_by_layer("quantised", targets=("layer_0",), how=how, base=base) < 0.2


@pytest.mark.parametrize("strategy", ["merged", "factored"])
def test_plain_layers_that_have_no_product_of_their_own_keep_no_floats_either(strategy):
    assert kept_by_layer("quantised", strategy, base=Einsums) < 0.2
    # And they multiply once: what is left of the layer it does for one token.
    flops = {
        base: compiled("quantised", 8, strategy, base=base).cost_analysis()["flops"]
        for base in (Layers, Einsums)
    }
    assert flops[Einsums] < flops[Layers] * (1 + 2 / TOKENS)


@pytest.mark.parametrize("how", TYPES)
def test_arguments_are_codes(how):
    bits = {"int8": 8, "nf4": 4}[how]
    sizes = (compiled(kind, 8, how=how).memory_analysis() for kind in ("quantised", "floats"))
    ours, theirs = (size.argument_size_in_bytes for size in sizes)
    scales = 8 * WIDTH * (WIDTH // 64 if how == "nf4" else 1) * 4
    assert ours == theirs - 8 * KERNEL * (32 - bits) // 32 + scales


@pytest.mark.parametrize("how", TYPES)
@pytest.mark.parametrize("strategy", ["merged", "factored"])
def test_a_step_s_operations_are_those_over_floats_and_a_few_for_each_code(strategy, how):
    flops = lambda kind: compiled(kind, 8, strategy, how=how).cost_analysis()["flops"]
    # In each pass: from codes to numbers, times the scale, and what orders the passes.
    of_each_code = {"int8": 6, "nf4": 9}[how]
    assert 0 < flops("quantised") - flops("floats") <= 2 * of_each_code * 8 * WIDTH * WIDTH


def test_no_float_kernel_is_among_the_residuals():
    base = Layers(2)
    params = quantize(base, jax.eval_shape(base.init, jax.random.key(0), X), X, **TYPES["nf4"])
    floats = {"params": jax.eval_shape(as_floats, params["params"])}
    kernel = lambda leaf: leaf.dtype == jnp.float32 and leaf.shape == (WIDTH, WIDTH)

    def residuals(params):
        model = RandLora(base, CONFIG)
        trains, frozen = rl.split(jax.eval_shape(model.adapt, params, X), CONFIG)
        loss = lambda t, f: jnp.mean(model.apply(rl.combine(t, f), jnp.ones(X.shape)))
        pull = lambda t, f: jax.vjp(lambda t: loss(t, f), t)[1]
        return jax.tree.leaves(jax.eval_shape(pull, trains, frozen))

    assert sum(map(kernel, residuals(floats))) == 2  # the base's own
    assert sum(map(kernel, residuals(params))) == 0
