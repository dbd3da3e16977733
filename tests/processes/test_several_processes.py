"""Two processes of four devices each, on loopback: they train, save and restore as one would."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import randlora_jax as rl
from tests.checkpoints import bits
from tests.processes import training
from tests.processes.ports import free_port

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of two processes that went on from step 2, which one process had reached."""
    folder = tmp_path_factory.mktemp("processes")
    for keep in (True, False):
        training.train(folder / f"bases-{keep}", 2, training.config(save_projection=keep))
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    port = free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests/processes/worker.py", port, "2", str(i), folder],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(output.rstrip().endswith("done") for output in outputs), "\n".join(outputs)
    return folder


@pytest.mark.parametrize("keep", [True, False])
def test_the_losses_are_those_of_one_process(trained, tmp_path, keep):
    config = training.config(save_projection=keep)
    _, expected = training.train(tmp_path, 6, config)
    losses = json.loads((trained / f"bases-{keep}.json").read_text())
    assert losses[:2] == expected[:2]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("shape", [None, (8, 1), (2, 4)], ids=str)
def test_one_process_goes_on_from_what_two_saved_on_any_mesh(trained, tmp_path, keep, shape):
    config = training.config(save_projection=keep)
    mesh = training.mesh(*shape) if shape else None
    variables, saved_config = rl.load_adapter(
        trained / f"bases-{keep}-adapter", training.base(mesh)
    )
    assert saved_config == config
    item = trained / f"bases-{keep}" / "6" / "adapter"
    assert bits(rl.load_adapter(item, training.base(mesh))[0]) == bits(variables)
    whole, _ = training.train(tmp_path, 6, config)
    for got, expected in zip(jax.tree.leaves(variables), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=1e-3, atol=1e-5)
