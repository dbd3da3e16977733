"""What runs in processes that are killed, or that save while others load."""

import itertools
import pathlib

import jax

import randlora_jax as rl
from tests.checkpoints import base, make
from tests.processes import training


def train_and_save(folder, steps, ready):
    """Trains with a checkpoint each step, and keeps the newest adapter in a folder of its own."""
    folder = pathlib.Path(folder)

    def keep(step, variables):
        rl.save_adapter(folder / "adapter", variables, training.config(), overwrite=True)
        ready.set()

    _, losses = training.train(folder / "steps", steps, after=keep)
    training.write(folder / "losses.json", losses)


def scaled(factor):
    """(variables, config) of an adapter whose every scale tells which one it is."""
    variables, config = make()
    return variables | {
        "randlora": jax.tree.map(lambda a: a * factor, variables["randlora"])
    }, config


def save_forever(path, ready, stop):
    for i in itertools.count(1):
        rl.save_adapter(path, *scaled(i), overwrite=True)
        ready.set()
        if stop.is_set():
            return


def save_on_a_small_disk(folder, limit):
    """Saves what fits, and then, over it, what does not: the first must stay as it was."""
    import resource

    folder = pathlib.Path(folder)
    small = make(3)
    rl.save_adapter(folder / "adapter", *small)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        rl.save_adapter(folder / "adapter", *large(), overwrite=True)
    except OSError as error:
        print("refused:", error)
    loaded, _ = rl.load_adapter(folder / "adapter", base())
    same = jax.tree.map(lambda a, b: bool((a == b).all()), loaded, small[0])
    print("kept:", jax.tree.all(same), sorted(path.name for path in folder.iterdir()))


def large():
    """(variables, config) of an adapter of half a megabyte."""
    import flax.linen as nn
    import jax.numpy as jnp

    from randlora_jax.linen import RandLora

    config = rl.RandLoraConfig(r=4, target_modules="all-linear")
    return RandLora(nn.Dense(300), config).init(jax.random.key(0), jnp.ones((1, 300))), config
