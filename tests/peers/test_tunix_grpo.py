"""tunix's GRPO, unmodified, on an injected actor: with a reference model and without."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.rl import rl_cluster
from tunix.rl import utils as rl_utils
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

import randlora_jax as rl
from randlora_jax.nnx import RandLoraParam, inject, variables

CONFIG = rl.RandLoraConfig(r=4, randlora_alpha=40.0, target_modules="all-linear")
SIZES = llama3.ModelConfig(
    num_layers=1, vocab_size=40, embed_dim=16, hidden_dim=32, num_heads=4, head_dim=4,
    num_kv_heads=2, rope_theta=10_000, norm_eps=1e-5,
)  # fmt: skip


class Letters:
    """A tokenizer: one token for each letter."""

    def encode(self, text, **_):
        return [3 + ord(letter) % 30 for letter in "".join(text)]

    def decode(self, ids, **_):
        return "".join(chr(97 + int(i) % 26) for i in ids)

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2

    def pad_id(self):
        return 0


def base_model():
    model = llama3.Llama3(SIZES, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(0), 99))
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param) and path[-1] in ("w", "kernel") and variable.ndim > 1:
            variable.set_value(0.3 * jax.random.normal(next(keys), variable.shape))
    return model


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("devices", [1, 4])
def test_it_trains_the_actor_s_scales(with_reference, devices):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]).reshape(-1, 1), ("fsdp", "tp"))
    reference = base_model()
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    nnx.update(reference, jax.device_put(nnx.state(reference), whole))
    actor = inject(nnx.merge(*nnx.split(reference)), CONFIG)  # on the same arrays
    # tunix compares all that is no LoRAParam, leaf by leaf: the reference needs the bases too.
    inject(reference, CONFIG, values=variables(actor), active=())
    assert rl_utils.is_sharing_backbone(reference, actor)
    Role = rl_cluster.Role
    cluster_config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys((Role.ACTOR, Role.REFERENCE, Role.ROLLOUT), mesh),
        rollout_engine="vanilla",
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.adamw(1e-2), eval_every_n_steps=100, max_steps=2,
            mini_batch_size=4, train_micro_batch_size=4,
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=8, max_prompt_length=8, kv_cache_size=32, top_k=20
        ),
    )  # fmt: skip
    scales = lambda model: jax.tree.map(np.asarray, nnx.state(model, RandLoraParam))
    frozen = lambda model: jax.tree.map(np.asarray, variables(model)["params"])
    before, base = scales(actor), frozen(actor)
    with mesh:
        cluster = rl_cluster.RLCluster(
            actor=actor, reference=reference if with_reference else None, tokenizer=Letters(),
            cluster_config=cluster_config,
        )  # fmt: skip
        learner = grpo_learner.GRPOLearner(
            rl_cluster=cluster,
            algo_config=grpo_learner.GRPOConfig(
                num_generations=2, beta=0.1 if with_reference else 0.0
            ),
            reward_fns=lambda prompts, completions, **_: [
                float(len(set(completion))) for completion in completions
            ],
        )
        learner.train([{"prompts": ["ab cd", "hello", "what", "who"]} for _ in range(2)])
    trained = cluster.actor_trainer.model
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, scales(trained))
    assert max(jax.tree.leaves(moved)) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, frozen(trained), base)
    jax.tree.map(np.testing.assert_array_equal, scales(cluster.rollout.model()), scales(trained))
    assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(scales(trained)))
