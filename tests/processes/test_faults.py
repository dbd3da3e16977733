"""Processes killed while they save, disks that are full, folders nobody can write to."""

import json
import multiprocessing
import os
import pathlib
import random
import subprocess
import sys
import time

import jax
import pytest

import randlora_jax as rl
from tests.checkpoints import base, bits, files, trained
from tests.processes import training, victims
from tests.processes.disks import small_disk

ROOT = pathlib.Path(__file__).parents[2]
KILLS = 20
# Forks of one process that has imported everything: a kill a second, not one in five.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.processes.victims"])


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """Of the processes that are started: they find these files, and have one device."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    jax.devices()  # ours are eight by now, whatever the environment says from here on
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        one_device = " --xla_force_host_platform_device_count=1"
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + one_device)
        patch.setenv("JAX_PLATFORMS", "cpu")
        # They are many and all compile the same: only the first does.
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def test_a_run_killed_twenty_times_while_it_saves_ends_as_one_that_was_never_killed(tmp_path):
    rng, seen = random.Random(0), []
    for _ in range(KILLS):
        ready, child = started(tmp_path, 10_000)
        assert ready.wait(120), "it did not come to its first checkpoint"
        time.sleep(rng.uniform(0, 0.3))
        child.kill()
        child.join()
        seen.append(state(rl.load_adapter(tmp_path / "adapter", training.base())[0]))
    done = [int(p.name) for p in (tmp_path / "steps").iterdir() if p.name.isdigit()]
    steps = max(done) + 3
    _, child = started(tmp_path, steps)
    child.join(300)
    assert child.exitcode == 0

    states = {}
    remember = lambda step, variables: states.setdefault(state(variables), step)
    whole, losses = training.train(tmp_path / "whole", steps, after=remember)
    assert json.loads((tmp_path / "losses.json").read_text()) == losses
    assert bits(rl.load_adapter(tmp_path / "adapter", training.base())[0]) == bits(whole)
    # What was there after each kill was whole, and never older than before.
    order = [states[each] for each in seen]
    assert order == sorted(order)
    assert order[-1] > KILLS // 2


def started(folder, steps):
    ready = CONTEXT.Event()
    child = CONTEXT.Process(target=victims.train_and_save, args=(folder, steps, ready))
    child.start()
    return ready, child


def state(variables):
    return repr(bits(variables["randlora"]))


def test_what_is_loaded_while_another_process_saves_is_always_a_whole_adapter(tmp_path):
    ready, stop = CONTEXT.Event(), CONTEXT.Event()
    saver = CONTEXT.Process(target=victims.save_forever, args=(tmp_path / "adapter", ready, stop))
    saver.start()
    assert ready.wait(120)
    first, seen = dict(victims.scaled(1)[0]["randlora"]), set()
    for _ in range(60):
        loaded, _ = rl.load_adapter(tmp_path / "adapter", base())
        factors = {
            round(float((loaded["randlora"][layer][name] / first[layer][name]).mean()), 3)
            for layer in first
            for name in first[layer]
        }
        assert len(factors) == 1
        seen |= factors
    stop.set()
    saver.join(60)
    assert saver.exitcode == 0
    assert len(seen) > 3, "nothing was saved meanwhile"
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_full_disk_is_told_and_leaves_the_adapter_that_was_there(tmp_path):
    # Without a small disk, a limit on the size of files: its writes fail, too.
    command, limit = small_disk(tmp_path, "300k"), 0
    if command is None:
        command, limit = [], 100_000
    call = f"save_on_a_small_disk({str(tmp_path)!r}, {limit})"
    code = f"from tests.processes import victims; victims.{call}"
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    done = subprocess.run(
        [*command, sys.executable, "-c", code], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    refused, kept = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
    assert refused.startswith(f"refused: {tmp_path}/adapter was not saved; what was there is as it")
    assert kept == "kept: True ['adapter']"


def test_a_folder_that_nobody_can_write_to_is_told():
    with pytest.raises(OSError, match=r"/sys/adapter was not saved"):
        rl.save_adapter("/sys/adapter", *trained())


def test_a_folder_that_can_only_be_read_loads(tmp_path):
    rl.save_adapter(tmp_path / "adapter", *trained())
    before = files(tmp_path)
    for path in [*tmp_path.rglob("*"), tmp_path]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert bits(rl.load_adapter(tmp_path / "adapter", base())[0]) == bits(trained()[0])
        if os.getuid():  # to root nothing is forbidden
            with pytest.raises(OSError, match="adapter was not saved"):
                rl.save_adapter(tmp_path / "adapter", *trained(4), overwrite=True)
        assert files(tmp_path) == before
    finally:
        for path in [tmp_path, *tmp_path.rglob("*")]:
            path.chmod(0o755)
