"""The README's code, run as it stands, one block after the other."""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

README = pathlib.Path(__file__).parents[1] / "README.md"


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, v = (nn.Dense(16, name=name)(x) for name in ("q_proj", "v_proj"))
        return q * jax.nn.sigmoid(v)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.q_proj, self.v_proj = (nnx.Linear(8, 16, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return self.q_proj(x) * jax.nn.sigmoid(self.v_proj(x))


def blocks():
    """(heading, code) of every block of Python."""
    for part in re.split(r"^(?=## )", README.read_text(), flags=re.M):
        for code in re.findall(r"```python\n(.*?)```", part, flags=re.S):
            yield part.splitlines()[0], code


def test_every_block_of_code_runs(tmp_path):
    x = jnp.ones((8, 8))
    linen = {
        "base_model": Model(),
        "pretrained": Model().init(jax.random.key(0), x)["params"],
        "x": x,
        "batch": x,
        "loss_of": lambda y: jnp.mean(jnp.square(y - 1)),
        "path": tmp_path / "adapter",
        "folder": tmp_path / "steps",
    }
    models = {"model": NnxModel(nnx.Rngs(0)), "another_model": NnxModel(nnx.Rngs(0))}
    ran = []
    for heading, code in blocks():
        if heading == "## PEFT":
            continue  # it needs a Llama that PEFT adapted: test_peft_smollm2.py has one
        names = linen
        if "from flax import nnx" in code:
            names = {**linen, **models, "path": tmp_path / "of_nnx"}
        with jax.numpy_dtype_promotion("standard"):  # the loss and optax mix them
            exec(compile(code, f"README.md, {heading}", "exec"), names)
        ran.append(heading)
    assert ran == ["## Use it in your own script"] * 2 + ["## On many devices"]
    assert (linen["folder"] / "1" / "adapter").is_dir()
