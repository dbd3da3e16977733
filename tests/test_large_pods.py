"""The shapes of a model of 70B on 64 devices, compiled and never run, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from tests import large_pod


@pytest.mark.parametrize("name", large_pod.LAYOUTS)
def test_no_more_is_gathered_than_for_the_frozen_model(name):
    devices = "--xla_force_host_platform_device_count=64"
    command = [sys.executable, "-m", "tests.large_pod", name]
    environment = {**os.environ, "XLA_FLAGS": devices}
    run = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
    base, by_compiler, told, scales = json.loads(run.stdout)
    for ours in (by_compiler, told):
        assert ours["all-gather"] <= base["all-gather"] + scales
        assert sum(ours.values()) <= sum(base.values()) + 1.05 * scales
