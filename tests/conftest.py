"""Every test runs on 8 forced host devices, with strict dtype promotion and no rank promotion."""

import importlib.util
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# There are as many tests at once as cores: more threads of torch would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest

from tests.compiling import QUICK

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        *(f"--{name}={value}".lower() for name, value in QUICK.items()),
    ]
)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# What runs PEFT itself, and the example's model, needs the extras `parity` and `examples`; golden
# files that PEFT made stand in for it elsewhere.
PEERS = ("torch", "peft", "transformers", "gguf", "tokenizers")
collect_ignore = [] if all(map(importlib.util.find_spec, PEERS)) else ["parity"]
# The type checkers are the extra `typing`, and read code that is not to be run.
CHECKERS = ("mypy", "pyright")
collect_ignore += [] if all(map(importlib.util.find_spec, CHECKERS)) else ["typing"]
collect_ignore_glob = ["golden/*.py", "typing/snippets/*.py"]
# And tests of peers need the libraries that they are about.
LIBRARIES = ("gemma", "maxtext", "openpi", "tunix")
missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
if collect_ignore or not importlib.util.find_spec("transformers.modeling_flax_utils"):
    missing.append("transformers")  # beside torch, and before its release 5
collect_ignore_glob += [f"peers/test_{name}*.py" for name in missing]


@pytest.fixture(autouse=True)
def _eight_devices():
    assert jax.device_count() == 8
