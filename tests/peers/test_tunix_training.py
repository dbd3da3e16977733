"""tunix's PeftTrainer, unmodified: what it trains and saves, and that it goes on bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.sft import peft_trainer

import randlora_jax as rl
from randlora_jax.nnx import RandLoraParam, inject, remove, variables
from tests import test_readme
from tests.pods import exchanged

CONFIG = rl.RandLoraConfig(r=4, randlora_alpha=40.0, target_modules="all-linear")
SIZES = llama3.ModelConfig(
    num_layers=2, vocab_size=32, embed_dim=16, hidden_dim=32, num_heads=4, head_dim=4,
    num_kv_heads=2, rope_theta=10_000, norm_eps=1e-5,
)  # fmt: skip


@pytest.fixture(params=["one device", "eight"])
def mesh(request):
    """None, or the mesh that the run is on, as tunix's scripts enter it."""
    if request.param == "one device":
        yield None
    else:
        mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        with mesh:
            yield mesh


def make(mesh, config=CONFIG):
    """A model on the mesh, and then injected: the order in which people write it."""
    model = llama3.Llama3(SIZES, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(0), 99))
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param) and path[-1] in ("w", "kernel") and variable.ndim > 1:
            # tunix begins with kernels of zeros, by which no gradient comes.
            variable.set_value(0.2 * jax.random.normal(next(keys), variable.shape))
    if mesh is not None:
        state = nnx.state(model)
        specs = nnx.get_partition_spec(state)
        shardings = jax.tree.map(
            lambda spec: jax.sharding.NamedSharding(mesh, spec), specs,
            is_leaf=lambda node: isinstance(node, jax.sharding.PartitionSpec),
        )  # fmt: skip
        nnx.update(model, jax.device_put(state, shardings))
        assert model.layers[0].attn.q_proj.w[...].sharding.mesh.shape == mesh.shape
    return inject(model, config)


def batches(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens = rng.integers(0, 32, (8, 9)).astype(np.int32)
        yield peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones((8, 9), np.int32))


def inputs(batch):
    length = batch.input_tokens.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": jnp.broadcast_to(jnp.arange(length), batch.input_tokens.shape),
        "attention_mask": jnp.broadcast_to(mask, (len(batch.input_tokens), length, length)),
    }


def trainer_of(model, folder, steps, accumulation=None):
    options = peft_trainer.TrainingConfig(
        eval_every_n_steps=100, max_steps=steps, gradient_accumulation_steps=accumulation,
        checkpoint_root_directory=str(folder),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=1),
    )  # fmt: skip
    trainer = peft_trainer.PeftTrainer(model, optax.adamw(1e-2), options)
    return trainer.with_gen_model_input_fn(inputs)


def run(mesh, folder, steps, accumulation=None):
    model = make(mesh)
    rl.pin_adapter(folder, variables(model), CONFIG)
    trainer = trainer_of(model, folder, steps, accumulation)
    trainer.train(batches(steps * (accumulation or 1)))
    return model, trainer


def scales(model):
    return nnx.to_pure_dict(nnx.state(model, RandLoraParam))


@pytest.mark.parametrize("accumulation", [None, 2])
def test_it_trains_the_scales_alone_and_goes_on_bit_for_bit(mesh, accumulation, tmp_path):
    whole, _ = run(mesh, tmp_path / "whole", 4, accumulation)
    start = make(mesh)
    for path, variable in nnx.to_flat_state(nnx.state(start, nnx.Param)):
        if not isinstance(variable, RandLoraParam):
            trained = dict(nnx.to_flat_state(nnx.state(whole, nnx.Param)))[path]
            np.testing.assert_array_equal(variable.get_value(), trained.get_value())
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), scales(start), scales(whole))
    assert jax.tree.all(changed)
    run(mesh, tmp_path / "parts", 2, accumulation)
    resumed, trainer = run(mesh, tmp_path / "parts", 4, accumulation)
    assert trainer.train_steps == 4
    jax.tree.map(np.testing.assert_array_equal, scales(resumed), scales(whole))


def test_its_checkpoints_hold_the_scales_alone(mesh, tmp_path):
    run(mesh, tmp_path / "steps", 2)
    with ocp.CheckpointManager(tmp_path / "steps") as manager:
        handler = ocp.PyTreeCheckpointHandler()
        saved = handler.metadata(manager.directory / "2" / "model_params").tree
    names = {path[-2].key for path, _ in jax.tree.leaves_with_path(saved)}
    assert names == {"randlora_lambda", "randlora_gamma"}


def test_other_bases_or_another_alpha_are_refused_before_anything_is_restored(mesh, tmp_path):
    run(mesh, tmp_path / "steps", 2)
    for changes in ({"projection_prng_key": 5}, {"randlora_alpha": 8.0}):
        config = CONFIG.replace(**changes)
        model = make(mesh, config)
        with pytest.raises(ValueError, match=f"another config: {next(iter(changes))}"):
            rl.pin_adapter(tmp_path / "steps", variables(model), config)


def test_devices_exchange_the_gradients_of_scales_beyond_the_base_s():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tokens = next(batches(1)).input_tokens
    given = inputs(peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens)))
    given = {k: v for k, v in given.items() if k != "input_mask"}
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    given = jax.device_put(given, where)

    def bytes_of(model, of):
        graphdef, wrt, rest = nnx.split(model, of, ...)

        def loss(wrt, rest, given):
            model = nnx.merge(graphdef, wrt, rest)
            names = ("input_tokens", "positions", "attention_mask")
            logits = model(*(given[n] for n in names[:2]), None, given[names[2]])[0]
            return jnp.mean(logits**2)

        step = jax.jit(jax.value_and_grad(loss))
        return sum(exchanged(step.lower(wrt, rest, given).compile()).values())

    with mesh:
        model = make(mesh)
        trains = sum(a.nbytes for a in jax.tree.leaves(nnx.state(model, RandLoraParam)))
        ours = bytes_of(model, RandLoraParam)
        first = lambda path, _: path[:3] == ("layers", 0, "input_layernorm")
        base = bytes_of(remove(model), first)
    # Einsum layers of tunix's own run on changed kernels, whose gradients are summed.
    kernels = sum(a.nbytes for a in jax.tree.leaves(nnx.state(model, nnx.Param)) if a.ndim == 3)
    assert ours <= base + 1.05 * trains + kernels + 256


def test_the_readme_s_block_runs(tmp_path):
    model = make(None)
    remove(model)
    options = peft_trainer.TrainingConfig(
        eval_every_n_steps=100, max_steps=2, checkpoint_root_directory=str(tmp_path / "steps")
    )
    names = {
        "inject": inject, "variables": variables, "rl": rl, "optax": optax, "model": model,
        "config": CONFIG, "options": options, "path": tmp_path / "adapter",
        "batches": [inputs(batch) for batch in batches(2)],
    }  # fmt: skip
    (code,) = test_readme.code_of(test_readme.TUNIX)
    exec(code, names)
    assert names["trainer"].train_steps == 2
    assert (tmp_path / "adapter").is_dir()
