"""One of several processes that train together: `worker.py PORT PROCESSES ID FOLDER`."""

import pathlib
import sys

import jax
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

import randlora_jax as rl
from tests.checkpoints import bits
from tests.processes import training


def whole(tree):
    return bits(multihost_utils.process_allgather(tree, tiled=True))


def check(folder, mesh, save_projection):
    """What another process saved goes on here; what is trained here is restored, to the bit."""
    config = training.config(save_projection=save_projection)
    name = f"bases-{save_projection}"
    training.train(folder / name, 4, config, mesh)
    variables, losses = training.train(folder / name, 6, config, mesh)
    adapter = folder / f"{name}-adapter"
    rl.save_adapter(adapter, variables, config)
    rl.save_adapter(adapter, variables, config, overwrite=True)
    with pytest.raises(FileExistsError):
        rl.save_adapter(adapter, variables, config)
    restored, restored_config = rl.load_adapter(adapter, training.base(mesh))
    assert restored_config == config
    assert whole(restored) == whole(variables)
    with ocp.CheckpointManager(folder / name) as manager:
        step, restored, _, _ = training.restore(manager, config, mesh)
    assert step == 6
    assert whole(restored) == whole(variables)
    same = lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert jax.tree.all(jax.tree.map(same, restored, variables))
    if jax.process_index() == 0:
        training.write(folder / f"{name}.json", losses)


def main(port, processes, process, folder):
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)
    for save_projection in (True, False):
        check(pathlib.Path(folder), training.mesh(4, 2), save_projection)
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
