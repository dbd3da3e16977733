"""The command line: what it prints, what it writes, and its exit codes."""

import json
import pathlib
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file, save_file

import randlora_jax as rl
from randlora_jax import peft
from randlora_jax.cli import main
from randlora_jax.linen import RandLora

GOLDEN = pathlib.Path(__file__).parent / "golden"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (exit code, what it printed, what it complained about)"""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def ours(tmp_path):
    """Folders of adapters of the library, with its own bases, stored or drawn again."""
    config = rl.RandLoraConfig(r=3, target_modules="all-linear", projection_prng_key=9)
    x = jnp.ones((1, 6))
    variables = RandLora(nn.Dense(8, name="up"), config).init(jax.random.key(0), x)
    variables = {"params": {}, **{k: variables[k] for k in ("randlora", "randlora_bases")}}
    variables["randlora"] = {"up": variables["randlora"]}
    rl.save_adapter(tmp_path / "stored", variables, config)
    rl.save_adapter(tmp_path / "seed", variables, config.replace(save_projection=False))
    return tmp_path


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("adapter_*")))
def test_inspect_tells_layers_sizes_seed_and_fingerprints(run, name):
    code, printed, _ = run("inspect", GOLDEN / name)
    assert code == 0
    seed = json.loads((GOLDEN / name / CONFIG).read_text())["projection_prng_key"]
    assert ["projection_prng_key", str(seed)] in [line.split() for line in printed.splitlines()]
    for key, array in load_file(GOLDEN / name / WEIGHTS).items():
        if key.endswith("lambda"):
            row = next(line for line in printed.splitlines() if line.startswith(key.split(".")[2]))
            assert str(array.shape) in row
    assert ("fingerprint randlora_B" in printed) == (name != "adapter_seed")


def test_inspect_and_verify_know_who_drew_the_bases(run, ours):
    for name in ("stored", "seed"):
        code, printed, _ = run("inspect", ours / name)
        assert code == 0
        assert "jax, threefry2x32" in printed
        assert "(3, 1, 6) and (8, 2, 3)" in printed
        code, printed, _ = run("verify", ours / name)
        assert code == 0
        assert "projection_prng_key=9 draws (jax" in printed
    code, printed, _ = run("verify", GOLDEN / "adapter_sparse")
    assert code == 0
    assert "torch >= 2.12" in printed


@pytest.mark.parametrize("name", ["adapter_projection", "adapter_sparse"])
def test_convert_goes_there_and_back(run, name, tmp_path):
    code, printed, _ = run("convert", GOLDEN / name, tmp_path / "ours")
    assert code == 0
    assert "an adapter of randlora_jax" in printed
    assert run("verify", tmp_path / "ours")[0] == 0
    code, printed, _ = run("convert", tmp_path / "ours", tmp_path / "small")
    assert code == 0
    assert "of it the bases" in printed
    code, printed, _ = run("convert", tmp_path / "ours", tmp_path / "theirs", "--layout", "copies")
    assert code == 0
    assert "copies of the bases" in printed
    small, theirs = (load_file(tmp_path / f / WEIGHTS) for f in ("small", "theirs"))
    assert len(theirs) > len(small) and all((theirs[k] == v).all() for k, v in small.items())
    assert (tmp_path / "theirs" / WEIGHTS).read_bytes() == (GOLDEN / name / WEIGHTS).read_bytes()
    theirs, golden = (
        json.loads((f / CONFIG).read_text()) for f in (tmp_path / "theirs", GOLDEN / name)
    )
    assert theirs == golden


def test_convert_writes_what_peft_would_for_a_seed_of_ours(run, ours):
    assert run("convert", ours / "seed", ours / "a")[0] == 0
    assert run("convert", ours / "stored", ours / "b")[0] == 0
    assert (ours / "a" / WEIGHTS).read_bytes() == (ours / "b" / WEIGHTS).read_bytes()
    assert json.loads((ours / "a" / CONFIG).read_text())["save_projection"] is True


def test_convert_knows_the_names_of_a_llama(run, tmp_path):
    tensors = load_file(GOLDEN / "adapter_projection" / WEIGHTS)
    named = {
        f"base_model.model.model.layers.{i}.mlp.up_proj.{leaf}": tensors[
            f"base_model.model.lin1.{leaf}"
        ]
        for i in range(2)
        for leaf in ("randlora_lambda", "randlora_gamma")
    }
    model = {key: tensors[key] for key in ("base_model.randlora_A", "base_model.randlora_B")}
    (tmp_path / "theirs").mkdir()
    save_file({k: v.copy() for k, v in (named | model).items()}, tmp_path / "theirs" / WEIGHTS)
    config = {"peft_type": "RANDLORA", "r": 4, "randlora_alpha": 8, "target_modules": ["up_proj"]}
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(config))
    assert run("convert", tmp_path / "theirs", tmp_path / "ours", "--names", "llama")[0] == 0
    _, printed, _ = run("inspect", tmp_path / "ours")
    assert "layers.mlp.up_proj  (2, 4, 5)  (2, 5, 20)" in printed
    assert run("convert", tmp_path / "ours", tmp_path / "back", "--names", "llama")[0] == 0
    assert peft.module_names(tmp_path / "back") == [
        f"model.layers.{i}.mlp.up_proj" for i in range(2)
    ]
    code, _, complaint = run("convert", tmp_path / "ours", tmp_path / "c")
    assert code == 1
    assert "--names has no module of PEFT's" in complaint


def test_convert_takes_a_file_of_names(run, tmp_path):
    names = tmp_path / "names.json"
    names.write_text('{"lin1": "up", "": "block"}')
    source = GOLDEN / "adapter_projection"
    assert run("convert", source, tmp_path / "ours", "--names", names)[0] == 0
    printed = run("inspect", tmp_path / "ours")[1]
    assert all(f"\n{name} " in printed for name in ("block.lin0", "up", "block.lin2"))
    assert run("convert", tmp_path / "ours", tmp_path / "back", "--names", names)[0] == 0
    assert peft.module_names(tmp_path / "back") == peft.module_names(source)
    for text in ("no json", "[1]", '{"a": ["b", 1]}', None):
        names.unlink() if text is None else names.write_text(text)
        code, _, complaint = run("convert", source, tmp_path / "new", "--names", names)
        assert code == 2
        assert f"--names {names}" in complaint
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("adapter_seed", "it has no bases"), ("adapter_bias", "need the base")],
)
def test_convert_says_what_it_needs_a_base_for(run, name, complaint, tmp_path):
    code, _, error = run("convert", GOLDEN / name, tmp_path / "a")
    assert code == 1
    assert complaint in error
    assert not (tmp_path / "a").exists()


def test_bases_that_no_seed_draws_are_told(run, tmp_path):
    shutil.copytree(GOLDEN / "adapter_projection", tmp_path / "a")
    values = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps(values | {"projection_prng_key": 1}))
    code, printed, _ = run("verify", tmp_path / "a")
    assert code == 1
    assert "projection_prng_key=1" in printed
    assert "unknown: not what the seed draws" in run("inspect", tmp_path / "a")[1]


def test_a_seed_of_torch_s_can_not_be_verified(run):
    code, printed, _ = run("verify", GOLDEN / "adapter_seed")
    assert code == 3
    assert "intact, and it has no bases to compare" in printed


def test_damage_is_exit_code_1(run, ours, tmp_path):
    shutil.copytree(GOLDEN / "adapter_projection", tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).write_bytes(b"x")
    for command in ("inspect", "verify"):
        code, printed, complaint = run(command, tmp_path / "a")
        assert (code, printed) == (1, "")
        assert WEIGHTS in complaint
    for file in (ours / "stored" / "d").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:50])
    code, _, complaint = run("verify", ours / "stored")
    assert code == 1
    assert "cut short or altered" in complaint


def test_wrong_usage_is_exit_code_2(run, tmp_path):
    code, _, complaint = run("inspect", tmp_path)
    assert code == 2
    assert "is no adapter" in complaint
    assert run("convert", GOLDEN / "adapter_sparse", tmp_path / "a")[0] == 0
    code, _, complaint = run("convert", GOLDEN / "adapter_sparse", tmp_path / "a")
    assert code == 2
    assert "overwrite" in complaint
    assert run("convert", GOLDEN / "adapter_sparse", tmp_path / "a", "--overwrite")[0] == 0
    for file in (WEIGHTS, CONFIG):
        code, _, complaint = run("verify", GOLDEN / "adapter_sparse" / file)
        assert code == 2
        assert f"is a file: give its folder, '{GOLDEN / 'adapter_sparse'}'" in complaint
    assert run("verify", GOLDEN / "adapter_sparse", "--adapter", "a/b")[0] == 2
    for arguments in (
        (),
        ("repair", "a"),
        ("convert", "a"),
        ("convert", "a", "b", "--layout", "x"),
    ):
        with pytest.raises(SystemExit) as error:
            run(*arguments)
        assert error.value.code == 2


@pytest.fixture
def folders(ours):
    """What the command line complains of, each for a reason of its own."""
    shutil.copytree(GOLDEN / "adapter_sparse", ours / "theirs")
    shutil.copytree(GOLDEN / "adapter_sparse", ours / "several" / "chat")
    shutil.copytree(GOLDEN / "adapter_projection", ours / "wide")
    wide = {k: v.astype("float64") for k, v in load_file(ours / "wide" / WEIGHTS).items()}
    save_file(wide, ours / "wide" / WEIGHTS)
    return ours


@pytest.mark.parametrize(
    ("arguments", "cure", "not_here"),
    [
        (("convert", "theirs", "stored"), "give another path or --overwrite", "overwrite=True"),
        (("convert", "stored", "theirs"), "give another path or --overwrite", "overwrite=True"),
        (("inspect", "several"), "--adapter can be one of ['chat']", "adapter_name"),
        (("verify", "several", "--adapter", ".."), "--adapter '..' must be a", "adapter_name"),
        (("convert", "wide", "new"), "set JAX_ENABLE_X64=1 to read", "jax_enable_x64"),
        (("convert", "theirs", "new", "--names", "llama"), "--names has no place for", "name_map"),
    ],
)
def test_complaints_name_flags_in_place_of_python_s_arguments(
    run, folders, monkeypatch, arguments, cure, not_here
):
    monkeypatch.chdir(folders)
    code, printed, complaint = run(*arguments)
    assert code and not printed
    assert cure in complaint
    assert not_here not in complaint


def test_a_path_is_told_as_it_is(run, tmp_path):
    _, _, complaint = run("inspect", tmp_path / "name_map" / "overwrite=True")
    assert f"{tmp_path}/name_map/overwrite=True is no adapter" in complaint


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "randlora_jax", "verify", GOLDEN / "adapter_projection"]
    done = subprocess.run(command, cwd=GOLDEN.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch >= 2.12" in done.stdout
