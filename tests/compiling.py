"""How tests compile: quickly, but where what the compiler makes of a function is what is tested."""

import functools

import jax

# Most of the time goes into compiling what runs once, which XLA's older emitters do in half of it.
# They are gone from jax 0.12, and 0.11 is not one of the versions that are tested. The level of
# optimisation stays: bits and tolerances depend on it.
_OLD = jax.__version_info__[:2] == (0, 10)
QUICK = {"xla_cpu_parallel_codegen_split_count": 1}
SHIPPED = {"xla_cpu_parallel_codegen_split_count": 32}
if _OLD:
    QUICK["xla_cpu_use_fusion_emitters"] = False
    SHIPPED["xla_cpu_use_fusion_emitters"] = True

# As outside of these tests.
shipped_jit = functools.partial(jax.jit, compiler_options=SHIPPED)
