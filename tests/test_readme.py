"""The README's code, run as it stands, one block after the other."""

import pathlib
import re
import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

import randlora_jax as rl
from randlora_jax.nnx import RandLoraParam, variables

README = pathlib.Path(__file__).parents[1] / "README.md"


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, v = (nn.Dense(16, name=name)(x) for name in ("q_proj", "v_proj"))
        return q * jax.nn.sigmoid(v)


class Moe(nn.Module):
    @nn.compact
    def __call__(self, x):
        shapes = {"wi": (4, 8, 16), "wo": (4, 16, 8)}
        wi, wo = (self.param(n, nn.initializers.normal(), s) for n, s in shapes.items())
        return jnp.stack([nn.gelu(x[e] @ wi[e]) @ wo[e] for e in range(4)])


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


# These need a Llama that PEFT adapted, and tunix: test_peft_smollm2.py and peers have them.
ELSEWHERE = ("## PEFT", "## Other people's models")


def is_of_nnx(code):
    """Whether the code is for NNX, where `variables` and `model` mean other things."""
    return "randlora_jax.nnx" in code


def names(folder):
    """What the README's code is given, in Linen and in NNX."""
    x = jnp.ones((8, 8))
    linen = {
        "base_model": Model(),
        "pretrained": Model().init(jax.random.key(0), x)["params"],
        "x": x,
        "batch": x,
        "microbatches": jnp.stack([x, x]),
        "Moe": Moe,
        "dispatched": jnp.ones((4, 3, 8)),
        "loss_of": lambda y: jnp.mean(jnp.square(y - 1)),
        "path": folder / "adapter",
        "folder": folder / "steps",
    }
    models = {"model": NnxModel(nnx.Rngs(0)), "another_model": NnxModel(nnx.Rngs(1))}
    return linen, {"path": folder / "of_nnx", "folder": folder / "steps_of_nnx", **models}


def run(heading, code, names):
    try:
        with jax.numpy_dtype_promotion("standard"):  # the loss and optax mix them
            exec(compile(code, f"README.md, {heading}", "exec"), names)
    finally:
        jax.config.update("jax_compilation_cache_dir", None)  # else of this process from now on


def test_every_block_of_code_runs(tmp_path):
    linen, _ = names(tmp_path)
    ran = []
    for heading, code in blocks():
        if heading in ELSEWHERE:
            continue
        _, of_nnx = names(tmp_path)
        run(heading, code, {**linen, "nnx": nnx, **of_nnx} if is_of_nnx(code) else linen)
        ran.append(heading)
    others = ["## Recipes"] * 6 + ["## On many devices"] * 5
    assert ran == ["## Use it in your own script"] * 2 + others
    assert (linen["folder"] / "steps" / "1" / "adapter").is_dir()
    assert (tmp_path / "steps_of_nnx" / "1" / "adapter").is_dir()


def on_many_devices(folder, steps, *which):
    """What is trained where these blocks of the section run, after what it rests on."""
    given, _ = names(pathlib.Path(folder))
    given["folder"] = pathlib.Path(steps)
    code = [code for heading, code in blocks() if heading == "## On many devices"]
    for one in (next(code for _, code in blocks()), *(code[i] for i in which)):
        run("On many devices", one, given)
    return given


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_a_new_process_trains_on(tmp_path):
    steps = tmp_path / "steps"
    given = on_many_devices(tmp_path / "first", steps, 0, 1)
    code = f"""
        import numpy
        from tests.test_readme import flat, on_many_devices
        given = on_many_devices({str(tmp_path / "second")!r}, {str(steps)!r}, 0, 2)
        numpy.save({str(tmp_path / "resumed.npy")!r}, flat(given["trainable"]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=README.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with jax.numpy_dtype_promotion("standard"):
        state = given["trainable"], given["opt_state"], given["frozen"]
        expected, _ = given["step"](*state, given["put"](given["batch"], "data"))
    np.testing.assert_allclose(np.load(tmp_path / "resumed.npy"), flat(expected), rtol=1e-5)
    assert not np.allclose(flat(expected), flat(given["trainable"]), rtol=1e-5)


def nnx_on_many_devices(folder):
    """An NNX model on the mesh, by the section's own block, and a step of its training."""
    given, of_nnx = names(pathlib.Path(folder))
    code = [code for heading, code in blocks() if heading == "## On many devices"]
    for one in (next(code for _, code in blocks()), code[0]):
        run("On many devices", one, given)
    given |= {"nnx": nnx, **of_nnx}
    run("On many devices", next(filter(is_of_nnx, code)), given)
    model, optimizer = given["model"], given["optimizer"]
    x = given["put"](given["batch"], "data")

    @nnx.jit
    def step(model, optimizer, x):
        loss = lambda model: given["loss_of"](model(x))
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, optimizer.wrt))(model))

    def train():
        with jax.numpy_dtype_promotion("standard"):
            step(model, optimizer, x)

    return model, optimizer, train


def scales_of(model):
    return flat(nnx.to_pure_dict(nnx.state(model, RandLoraParam)))


def saved(model, optimizer, save_or_restore):
    """The items of a checkpoint, as under Recipes."""
    adapter, state = save_or_restore
    items = {"adapter": adapter(variables(model), model.randlora_config)}
    return ocp.args.Composite(**items, optimizer=state(nnx.state(optimizer)))


SAVE = rl.AdapterSave, ocp.args.StandardSave
RESTORE = rl.AdapterRestore, ocp.args.StandardRestore


def test_a_new_process_trains_on_in_nnx(tmp_path):
    model, optimizer, train = nnx_on_many_devices(tmp_path / "first")
    train()
    with ocp.CheckpointManager(tmp_path / "steps") as manager:
        manager.save(1, args=saved(model, optimizer, SAVE))
    code = f"""
        import numpy
        import orbax.checkpoint as ocp
        from flax import nnx
        from randlora_jax.nnx import update
        from tests.test_readme import RESTORE, nnx_on_many_devices, saved, scales_of
        model, optimizer, train = nnx_on_many_devices({str(tmp_path / "second")!r})
        with ocp.CheckpointManager({str(tmp_path / "steps")!r}) as manager:
            restored = manager.restore(1, args=saved(model, optimizer, RESTORE))
        update(model, restored.adapter[0])
        nnx.update(optimizer, restored.optimizer)
        train()
        numpy.save({str(tmp_path / "resumed.npy")!r}, scales_of(model))
    """
    before = scales_of(model)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=README.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    train()
    np.testing.assert_allclose(np.load(tmp_path / "resumed.npy"), scales_of(model), rtol=1e-5)
    assert not np.allclose(before, scales_of(model), rtol=1e-5)
