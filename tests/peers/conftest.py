"""Peers mix dtypes and ranks, as the rest of our tests may not."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _promotion():
    # Not as a context, which would not reach the threads that tunix starts.
    names = {"jax_numpy_dtype_promotion": "standard", "jax_numpy_rank_promotion": "allow"}
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
