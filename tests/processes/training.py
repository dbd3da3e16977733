"""A small training run that its tests kill, resume, divide among processes, and move."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import randlora_jax as rl
from randlora_jax.linen import RandLora

TX = optax.adam(1e-2)


class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            h = nn.Dense(32, use_bias=False, name=f"up_{i}")(x)
            x = x + nn.Dense(16, use_bias=False, name=f"down_{i}")(nn.gelu(h))
        return x


def config(**values):
    return rl.RandLoraConfig(**{"r": 4, "target_modules": "all-linear", **values})


def mesh(data, model):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def base(on=None, dtype=jnp.float32):
    """The base's variables, and if there is a mesh, divided over all of it."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: (rng.standard_normal(shape) / 4).astype(dtype)
    kernels = {"up": lambda: draw(16, 32), "down": lambda: draw(32, 16)}
    params = {f"{name}_{i}": {"kernel": kernels[name]()} for name in kernels for i in range(2)}
    spec = lambda path: P("data", "model") if path[0].key.startswith("up") else P("model", "data")
    put = lambda path, a: jax.device_put(a, NamedSharding(on, spec(path)))
    place = put if on else lambda path, a: jnp.asarray(a)
    return {"params": jax.tree_util.tree_map_with_path(place, params)}


def batch(step):
    """Inputs (8, 16) and targets (8, 16) of a step."""
    return np.random.default_rng(step).standard_normal((2, 8, 16), np.float32)


@jax.jit
def update(trainable, opt_state, frozen, batch):
    def loss(trainable):
        predicted = RandLora(Blocks(), config()).apply(rl.combine(trainable, frozen), batch[0])
        return jnp.mean(jnp.square(predicted - batch[1]))

    value, gradients = jax.value_and_grad(loss)(trainable)
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
        updates, opt_state = TX.update(gradients, opt_state, trainable)
    return optax.apply_updates(trainable, updates), opt_state, value


def everywhere(tree, on):
    """Arrays that are on no mesh yet, whole on all of it."""
    there = lambda a: isinstance(getattr(a, "sharding", None), NamedSharding)
    put = lambda a: a if there(a) else jax.device_put(np.asarray(a), NamedSharding(on, P()))
    return jax.tree.map(put, tree) if on else tree


def place(variables, its_config, on):
    if on is None:
        return variables
    return jax.device_put(variables, rl.sharding(variables, its_config, on, data_axes=["data"]))


def start(its_config, on=None):
    """(variables, state of the optimizer) before the first step."""
    variables = RandLora(Blocks(), its_config).adapt(
        base(on), jax.ShapeDtypeStruct((1, 16), "float32")
    )
    variables = place(everywhere(variables, on), its_config, on)
    return variables, fresh_state(variables, its_config, on)


def fresh_state(variables, its_config, on=None):
    """The optimizer's, before the first step."""
    return everywhere(TX.init(rl.split(variables, its_config)[0]), on)


def restore(manager, its_config, on=None):
    """(step, variables, optimizer's state, losses) of the last checkpoint, else of the start."""
    step = manager.latest_step()
    if step is None:
        return 0, *start(its_config, on), []
    args = ocp.args.Composite(adapter=rl.AdapterRestore(base(on)), losses=ocp.args.JsonRestore())
    saved = manager.restore(step, args=args)
    variables, saved_config = saved.adapter
    assert saved_config == its_config
    variables = place(variables, its_config, on)
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh_state(variables, its_config, on))
    args = ocp.args.Composite(opt_state=ocp.args.StandardRestore(like))
    return step, variables, manager.restore(step, args=args).opt_state, saved.losses


def train(folder, steps, its_config=None, on=None, after=lambda step, variables: None):
    """Trains up to a step, from the last checkpoint on, saving each step: (variables, losses)."""
    its_config = its_config or config()
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(folder, options=options) as manager:
        step, variables, opt_state, losses = restore(manager, its_config, on)
        trainable, frozen = rl.split(variables, its_config)
        while step < steps:
            pair = batch(step)
            pair = jax.device_put(pair, NamedSharding(on, P(None, "data"))) if on else pair
            trainable, opt_state, loss = update(trainable, opt_state, frozen, pair)
            losses.append(float(loss))
            step += 1
            args = ocp.args.Composite(
                adapter=rl.AdapterSave(rl.combine(trainable, frozen), its_config),
                opt_state=ocp.args.StandardSave(opt_state),
                losses=ocp.args.JsonSave(losses),
            )
            manager.save(step, args=args)
            after(step, rl.combine(trainable, frozen))
        manager.wait_until_finished()
    return rl.combine(trainable, frozen), losses


def write(path, value):
    path.write_text(json.dumps(value))
