"""README: its code, run as it stands, its index, and the messages that it explains."""

import ast
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
import pytest
from flax import nnx

import randlora_jax as rl
from randlora_jax import linen as linen_door
from randlora_jax import nnx as nnx_door
from randlora_jax import ops
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


FIRST = "In Linen"  # all other sections go on from its code
MESH = "On a mesh"
TUNIX = "With tunix"  # which is not installed here: peers/test_tunix_training.py runs that block


def blocks():
    """(heading, code) of every block of Python."""
    for part in re.split(r"^###? ", README.read_text(), flags=re.M):
        for code in re.findall(r"```python\n(.*?)```", part, flags=re.S):
            yield part.splitlines()[0], code


def code_of(heading):
    """The blocks of one section."""
    return [code for found, code in blocks() if found == heading]


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
        "new_folder": folder / "for_peft",
    }
    models = {"model": NnxModel(nnx.Rngs(0)), "another_model": NnxModel(nnx.Rngs(1))}
    return linen, {"path": folder / "of_nnx", "folder": folder / "steps_of_nnx", **models}


def run(heading, code, names):
    try:
        with jax.numpy_dtype_promotion("standard"):  # the loss and optax mix them
            exec(compile(code, f"README.md, {heading}", "exec"), names)
    finally:
        jax.config.update("jax_compilation_cache_dir", None)  # else of this process from now on


SECTIONS = {
    FIRST: 1,
    "In NNX, in place": 1,
    MESH: 5,
    "Over a quantised base": 1,
    "Many adapters": 2,
    "PEFT": 1,
    "Dropout, and several microbatches": 1,
    "Checkpoints in NNX": 1,
    "Experts": 1,
}


def test_these_are_all_sections_with_code():
    headings = [heading for heading, _ in blocks() if heading != TUNIX]
    assert headings == [heading for heading, count in SECTIONS.items() for _ in range(count)]


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_block_of_code_runs(heading, tmp_path):
    linen, _ = names(tmp_path)
    (first,) = code_of(FIRST)
    run(FIRST, first, linen)
    if heading == "PEFT":
        linen |= of_peft(linen["folder"])
    for code in code_of(heading) if heading != FIRST else ():
        _, of_nnx = names(tmp_path)
        run(heading, code, {**linen, "nnx": nnx, **of_nnx} if is_of_nnx(code) else linen)
    if heading == MESH:
        assert (linen["folder"] / "steps" / "1" / "adapter").is_dir()
    if heading == "Checkpoints in NNX":
        assert (tmp_path / "steps_of_nnx" / "1" / "adapter").is_dir()


def of_peft(folder):
    """What its section has: a Llama's parameters, stacked, and an adapter of PEFT's for them."""
    q_proj = {"kernel": jnp.ones((2, 8, 8))}
    params = {"layers": {"self_attn": {"q_proj": q_proj}}}
    config = rl.RandLoraConfig(r=2, target_modules=["q_proj"])
    scales = {"randlora_lambda": jnp.ones((2, 2, 4)), "randlora_gamma": jnp.ones((2, 4, 8))}
    variables = {
        "params": params,
        "randlora": {"layers": {"self_attn": {"q_proj": scales}}},
        "randlora_bases": rl.draw_bases(config, 8, 8),
    }
    rl.peft.save_adapter(folder, variables, config, rl.peft.llama_name_map)
    return {"params": params}


def test_the_index_lists_what_is_public():
    index = README.read_text().split("## API")[1]
    listed = dict(re.findall(r"^\| `(randlora_jax[.\w]*)` \| (.*) \|$", index, flags=re.M))
    for door in (rl, rl.adapters, rl.peft, linen_door, nnx_door, ops):
        assert re.findall(r"`(\w+)`", listed.pop(door.__name__)) == list(door.__all__)
    assert not listed


def test_messages_that_are_explained_are_ours():
    """Those of the table, but for what is said to be of JAX or PEFT."""
    table = README.read_text().split("## Troubleshooting")[1].split("## ")[0]
    rows = re.findall(r"^\| `(.+?)`(.*?) \| ", table, flags=re.M)
    assert len(rows) > 10
    texts = []
    for path in pathlib.Path(rl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    missing = [m for m, whose in rows if "words" not in whose and not any(m in t for t in texts)]
    assert missing == []


def test_what_it_links_to_is_there():
    for file in (README, README.parent / "examples" / "README.md"):
        for link in re.findall(r"\]\((?!https:)(.+?)\)", file.read_text()):
            assert (file.parent / link).exists(), link


def on_many_devices(folder, steps, *which):
    """What is trained where these blocks of the section run, after what it rests on."""
    given, _ = names(pathlib.Path(folder))
    given["folder"] = pathlib.Path(steps)
    code = code_of(MESH)
    for one in (*code_of(FIRST), *(code[i] for i in which)):
        run(MESH, one, given)
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
    code = code_of(MESH)
    for one in (*code_of(FIRST), code[0]):
        run(MESH, one, given)
    given |= {"nnx": nnx, **of_nnx}
    run(MESH, next(filter(is_of_nnx, code)), given)
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
    """The items of a checkpoint, as under Checkpoints in NNX."""
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
