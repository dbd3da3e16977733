"""How tests compile where what the compiler makes of a function is what is tested."""

import functools

import jax

# As outside of these tests, where there are none of the flags of `conftest`.
shipped_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_cpu_use_fusion_emitters": True,
        "xla_cpu_parallel_codegen_split_count": 32,
    },
)
