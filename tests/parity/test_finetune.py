"""The main example: interrupted, resumed, divided among devices, and told what it can't do."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import adapter_training
import dialogues
import finetune_smollm2
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import randlora_jax as rl
from tests.checkpoints import bits, files
from tests.parity.tiny_finetune import REPLACED, SETTINGS, load
from tests.processes.disks import small_disk
from tests.processes.ports import free_port

ROOT = pathlib.Path(__file__).parents[2]


@contextlib.contextmanager
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        for replaced in REPLACED:
            patch.setattr(*replaced)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield


@pytest.fixture(autouse=True)
def always_tiny():
    with tiny():
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The runs jit functions of their own: all but the first find them compiled."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    compilation_cache.reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    compilation_cache.reset_cache()
    for name, value in before.items():
        jax.config.update(name, value)


def train(folder, *more):
    """The losses of all steps, as the last checkpoint has them."""
    finetune_smollm2.main([*SETTINGS, "--output-dir", str(folder), *more])
    return losses_of(folder)


def losses_of(folder):
    last = max(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    return json.loads((folder / "checkpoints" / str(last) / "losses" / "metadata").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, losses) of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with tiny():
        return folder, train(folder)


def adapter(folder):
    return bits(rl.load_adapter(folder / "adapter", {"params": load()[1]})[0])


def test_it_saves_what_it_trained_and_draws_the_losses(whole):
    folder, losses = whole
    assert len(losses) == 6
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert adapter(folder)


@pytest.mark.parametrize("after", [1, 4])
def test_an_interrupted_run_goes_on_to_the_same_bits(whole, tmp_path, monkeypatch, after):
    batches = dialogues.batches

    def interrupted(*args, **kwargs):
        for i, batch in enumerate(batches(*args, **kwargs)):
            if i == after:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(dialogues, "batches", interrupted)
        with pytest.raises(SystemExit, match="interrupted: what was done is saved"):
            finetune_smollm2.run([*SETTINGS, "--output-dir", str(tmp_path)])
    assert len(losses_of(tmp_path)) == after
    assert train(tmp_path, "--resume") == whole[1]
    assert adapter(tmp_path) == adapter(whole[0])


def test_a_signal_stops_it_with_one_line_and_all_that_was_done_saved(tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "examples"), *sys.path])
    code = "import sys; from tests.parity.tiny_finetune import run; run(sys.argv[1:])"
    many = [*SETTINGS[:-1], "5000", "--output-dir", str(tmp_path)]
    child = subprocess.Popen(
        [sys.executable, "-c", code, *many],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 200
    while not list(tmp_path.glob("checkpoints/[2-9]0")) and time.monotonic() < until:
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    errors = child.communicate(timeout=100)[1].strip().splitlines()
    assert child.returncode == 1
    assert errors[-1] == "interrupted: what was done is saved, go on with --resume"
    assert len(losses_of(tmp_path)) >= 20


def test_a_mesh_gives_the_same_losses(whole, tmp_path):
    np.testing.assert_allclose(train(tmp_path, "--mesh", "4x2"), whole[1], rtol=1e-4)


def test_two_processes_give_the_same_losses_and_one_voice(whole, tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": "2"}
    env["XLA_FLAGS"] = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    env["JAX_COORDINATOR_ADDRESS"] = f"localhost:{free_port()}"
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "examples"), *sys.path])
    code = "import sys; from tests.parity.tiny_finetune import run; run(sys.argv[1:])"
    given = [*SETTINGS, "--mesh", "4x2", "--distributed", "--output-dir", str(tmp_path)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *given],
            env={**env, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert "logits identical" in said[0][0]
    # The collectives' own library speaks in both.
    assert not [word for word in ("loss", "logits", "layers") if word in said[1][0]]
    np.testing.assert_allclose(losses_of(tmp_path), whole[1], rtol=1e-4)


REFUSED = [
    (["--resume"], "error: there is no run to resume in "),
    (["--seq-len", "30"], "error: --seq-len 30 cuts the answers of 693 of 693 pairs off"),
    (["--mesh", "3x2"], "error: --mesh 3x2 must be DATAxMODEL, such as 8x1, with the 8 devices"),
    (["--mesh", "two"], "error: --mesh two must be DATAxMODEL"),
    (["--mesh", "8x1"], "error: --batch-size 4 does not divide by the mesh 8x1"),
    (["--ask", "Who?"], "adapter is no adapter"),
    (["--output-dir", "/sys/nowhere"], "error: .*/sys/nowhere"),
]


@pytest.mark.parametrize("more, message", REFUSED, ids=lambda value: str(value)[:30])
def test_what_it_cannot_do_it_says_in_one_line_and_leaves_nothing(tmp_path, more, message):
    with pytest.raises(SystemExit, match=message) as exit:
        finetune_smollm2.run([*SETTINGS, "--output-dir", str(tmp_path / "out"), *more])
    assert "\n" not in str(exit.value)
    assert not files(tmp_path)


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "holds a run already: go on with --resume"),
        (["--resume", "--rank", "8"], "--resume needs the settings of the run in .*'rank': 4"),
    ],
    ids=["again", "other settings"],
)
def test_a_run_that_is_there_is_left_as_it_is(whole, more, message):
    before = files(whole[0])
    with pytest.raises(SystemExit, match=message):
        finetune_smollm2.run([*SETTINGS, "--output-dir", str(whole[0]), *more])
    assert files(whole[0]) == before


@pytest.mark.parametrize("package", ["rich", "matplotlib", "yaml"])
def test_a_missing_extra_is_named_with_the_command_that_brings_it(tmp_path, monkeypatch, package):
    for name in [package, *(n for n in sys.modules if n.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=rf"error: .*{package}.*pip install -e \"\.\[examples\]\""):
        finetune_smollm2.run([*SETTINGS, "--output-dir", str(tmp_path / "out")])
    assert not files(tmp_path)


def test_a_full_disk_is_told_in_one_line_and_what_was_saved_before_stays(tmp_path):
    # Without a small disk, a limit on the size of files: its writes fail, too.
    command = small_disk(tmp_path, "8m")
    fails = "fill" if command else "limit"
    code = (
        "import sys, pathlib; from tests.parity import test_finetune, tiny_finetune;"
        f"tiny_finetune.run_while_the_disk_fills(sys.argv[1:], tiny_finetune.{fails});"
        "print(len(test_finetune.losses_of(pathlib.Path(sys.argv[-1]))))"
    )
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "examples"), *sys.path])
    settings = [*SETTINGS[:-1], "60", "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(
        [*(command or []), sys.executable, "-c", code, *settings],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *_, told, kept = done.stdout.splitlines()
    assert told.startswith("error: ")
    assert int(kept) == 20


def test_the_optimizer_warms_up_and_decays():
    tx, weights = adapter_training.optimizer(100, 1e-3), {"w": np.ones(3, np.float32)}
    state, sizes = tx.init(weights), []
    for _ in range(100):
        updates, state = tx.update({"w": np.ones(3, np.float32)}, state, weights)
        sizes.append(float(np.abs(updates["w"]).max()))
    assert sizes[0] == 0
    assert np.argmax(sizes) in range(9, 12)
    assert sizes[-1] < 0.2 * max(sizes)
