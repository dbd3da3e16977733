"""Models of billions of parameters: adapted as shapes alone, and the size of their checkpoints."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smollm2

import randlora_jax as rl
from randlora_jax import trees
from randlora_jax.bases import nbytes, read_dims
from randlora_jax.linen import RandLora
from randlora_jax.sites import Kernel

LLAMA_3_8B = smollm2.LlamaConfig(
    vocab_size=128256, hidden_size=4096, ffn_size=14336, layers=32, heads=32, kv_heads=8
)
LLAMA_3_2_3B = smollm2.LlamaConfig(
    vocab_size=128256, hidden_size=3072, ffn_size=8192, layers=28, heads=24, kv_heads=8
)
TOKENS = jax.ShapeDtypeStruct((1, 8), jnp.int32)


def shapes(sizes, config, **options):
    """(model, variables as shapes)."""
    model = RandLora(smollm2.Llama(sizes), config, **options)
    params = jax.eval_shape(model.base.init, jax.random.key(0), TOKENS)["params"]
    return model, jax.eval_shape(model.adapt, {"params": params}, TOKENS)


def test_adapting_llama_3_8b_allocates_nothing_and_draws_one_pair_of_bases():
    config = rl.RandLoraConfig(r=32, target_modules="all-linear")
    model, variables = shapes(LLAMA_3_8B, config)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(variables))
    sizes = {name: x.shape for name, x in variables["randlora_bases"].items()}
    # What the layers read: PEFT has the largest input by the largest output, 14336 x 14336.
    assert sizes == {"randlora_A": (32, 1, 4096), "randlora_B": (14336, 128, 32)}
    assert round(nbytes(variables["randlora_bases"]) / 2**30, 2) == 0.22
    assert {path[-2] for path, _ in trees.items(variables["randlora"])} == {
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    logits = jax.eval_shape(model.apply, variables, TOKENS)
    assert logits.shape == (1, 8, 128256)
    # Seven layers, two of 1024, five of 4096 on their smaller side; times 32.
    each = 2 * (32 * 32 + 32 * 1024) + 5 * (32 * 128 + 128 * 4096)
    assert f"{32 * each:,} of " in rl.summary(variables, config, tokens=4096)


@pytest.mark.parametrize("r, gibibytes", [(32, 9.5), (512, 0.6)])
def test_what_the_training_of_70b_keeps_on_each_device(r, gibibytes):
    """As in README: the scales and Adam's two moments, of all linear layers, in float32."""
    kernels = {(8192, 8192): 2, (8192, 1024): 2, (8192, 28672): 2, (28672, 8192): 1}
    sizes = lambda kernel: (math.prod(shape) for shape in Kernel(kernel).scale_shapes(r))
    scales = 80 * sum(count * sum(sizes(kernel)) for kernel, count in kernels.items())
    assert round(3 * 4 * scales / 2**30, 1) == gibibytes
    config = rl.RandLoraConfig(r=r)
    bases = jax.eval_shape(lambda: rl.draw_bases(config, *read_dims(config, kernels)))
    assert round(nbytes(bases) / 2**30, 2) == {32: 0.88, 512: 0.89}[r]


@pytest.mark.parametrize("keep, megabytes", [(False, 38), (True, 57)], ids=["seed", "bfloat16"])
def test_an_adapter_of_llama_3_2_3b_is_small(tmp_path, keep, megabytes):
    config = rl.RandLoraConfig(target_modules=["q_proj", "v_proj"], save_projection=keep)
    _, variables = shapes(LLAMA_3_2_3B, config, bases_dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32))
    variables["randlora"] = jax.tree.map(draw, variables["randlora"])
    variables["randlora_bases"] = rl.draw_bases(config, 3072, 3072, jnp.bfloat16)
    rl.save_adapter(tmp_path / "adapter", variables, config)
    size = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert 0.8 * megabytes * 1e6 < size <= megabytes * 1e6
    loaded, _ = rl.load_adapter(tmp_path / "adapter", {"params": variables["params"]})
    for name, array in variables["randlora_bases"].items():
        assert loaded["randlora_bases"][name].dtype == jnp.bfloat16
        assert bool((loaded["randlora_bases"][name] == array).all())


def test_an_export_of_llama_3_2_3b_for_peft_is_small_too(tmp_path):
    """With PEFT's copies it is 2.21 GB; `layout="copies"` would write as much."""
    config = rl.RandLoraConfig(target_modules=["q_proj", "v_proj"])
    _, variables = shapes(LLAMA_3_2_3B, config)
    zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
    variables |= {name: zeros(variables[name]) for name in ("randlora", "randlora_bases")}
    size = rl.peft.save_adapter(tmp_path, variables, config, rl.peft.llama_name_map)
    scales_and_bases = 37_158_912 + 38_141_952
    assert scales_and_bases < size < scales_and_bases + 20_000
