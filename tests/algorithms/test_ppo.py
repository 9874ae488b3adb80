"""PPO: what must hold whatever is learnt, who learns when, and where its critic comes from."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table_model import TableModel, random_params

from rlhf.algorithms.base import Runtime
from rlhf.algorithms.critic import Critic
from rlhf.algorithms.policy_terms import kl_coefficient
from rlhf.algorithms.ppo import PPO
from rlhf.errors import ConfigError
from rlhf.model.lora import LoRA, draw_adapter
from rlhf.ops.kl import InReward, NoKL
from rlhf.ops.policy import Clipped, DualClipped
from rlhf.ops.reward_shaping import Adaptive

SETTINGS = {"learning_rate": 1e-3, "batch_size": 4, "microbatch_size": 4}
ONLINE = (
    "algorithm=ppo", "reward=length", "reward.length.target=4", "algorithm.max_new_tokens=8", "evaluation.rows=0",
    "algorithm.epochs=2", "algorithm.minibatches=2", "algorithm.microbatch_size=2", "algorithm.method.temperature=0.7",
)  # fmt: skip


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


@pytest.mark.parametrize("lora", [(), ("model.lora.rank=4",)], ids=["whole", "adapter"])
def test_identities_at_learning_rate_0(command, small, tmp_path, lora):
    """The policy that is trained is the one that sampled and the reference: in every step and minibatch."""
    words = [word for word in small if not word.startswith(("algorithm.microbatch", "evaluation.rows", "trainer.max"))]
    done = command(
        *ONLINE, *lora, *words, "algorithm.method.top_k=50", "algorithm.learning_rate=0", "trainer.max_steps=3",
        "algorithm.critic.learning_rate=1e-2", "hydra.run.dir=run",
    )  # fmt: skip
    assert done.code == 0, done.output
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 3
    for row in rows:
        assert row["policy/ratio"] == row["policy/ratio/max"] == 1
        assert [row[f"policy/clipfrac{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]
        np.testing.assert_allclose([row[f"kl/k{number}"] for number in (1, 2, 3)], 0, atol=1e-6)
        np.testing.assert_allclose([row["policy/approx_kl"], row["reward/kl_penalty"]], 0, atol=1e-6)
    assert rows[-1]["value/loss"] != rows[0]["value/loss"]  # the critic learns


def test_the_critic_learns_alone_while_it_warms_up():
    ppo = PPO(**SETTINGS, critic=Critic(learning_rate=1e-2, warmup=4))
    rates = [ppo.learning_rates(("model", "critic"), jnp.int32(n), jnp.int32(100)) for n in (3, 4)]
    assert float(rates[0]["model"]) == 0
    assert float(rates[1]["model"]) > 0
    assert float(rates[0]["critic"]) > 0
    assert ppo.clip_groups(("model", "vision", "critic")) == [("model", "vision"), ("critic",)]


def test_a_batch_ends_early_where_the_policy_is_far():
    ppo = PPO(**SETTINGS, target_kl=0.1)
    assert ppo.stops_early
    assert ppo.is_far({"policy/approx_kl": 0.2})
    assert not ppo.is_far({"policy/approx_kl": 0.05})
    assert not PPO(**SETTINGS).stops_early


def test_no_divergence_needs_no_reference():
    assert not PPO(**SETTINGS, kl=NoKL()).needs_reference
    assert not PPO(**SETTINGS, kl=InReward(coef=0.0, per_token=True)).needs_reference
    assert PPO(**SETTINGS, kl=Adaptive()).needs_reference


def params(width: int = 8) -> dict:
    return {"model": {"final_norm": jnp.zeros(width), "embedding": jnp.ones((4, width))}}


def test_a_critic_begins_as_the_policy_with_values_of_0():
    found = Critic().begin(params(), None, 0)
    assert found["model"] is params or set(found) == {"model", "head"}
    assert not found["head"]["weight"].any()


def test_a_critic_begins_as_a_reward_model():
    head = {"weight": jnp.ones(8), "bias": jnp.float32(1), "scale": jnp.float32(2)}
    found = Critic(start="rm").begin(params(), lambda path: {**params(), "head": head}, 0)
    assert found["head"] is head
    drawn = Critic(start="sft").begin(params(), lambda path: params(), 0)
    assert drawn["head"]["weight"].any()


def test_a_critic_shares_the_base_of_an_adapter():
    from rlhf.model.gemma3 import Architecture

    small = Architecture(
        vocab_size=4, width=8, ff_width=8, layers=1, heads=1, kv_heads=1, head_width=8, query_scale=1.0, window=4
    )
    policy = {
        **params(),
        "adapter": draw_adapter(jax.random.key(0), small, LoRA(rank=2)),
        "adapter_scale": jnp.float32(1),
    }
    found = Critic().begin(policy, None, 0)
    assert set(found) == {"adapter", "head"}
    from_reward_model = Critic(start="rm").begin(policy, lambda path: {**params(), "adapter": "its own"}, 0)
    assert from_reward_model["adapter"] == "its own"
    elsewhere = Critic(start="rm").begin(policy, lambda path: params(), 0)  # of another base: its weights are kept
    assert set(elsewhere) == {"model", "head"}
    with pytest.raises(ConfigError, match=r"algorithm\.critic\.start=rm holds no adapter of model\.lora's shape"):
        Critic(start="rm", weights="adapter").begin(policy, lambda path: params(), 0)
    with pytest.raises(ConfigError, match=r"algorithm\.critic\.weights=adapter needs a policy that is one"):
        Critic(weights="adapter").begin(params(), None, 0)


def prepared(random: np.random.Generator) -> dict:
    """What `loss` reads, of two answers with three tokens each."""
    shape, is_answer = (2, 5), np.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]], bool)
    numbers = {
        name: random.normal(0, 1, shape).astype(np.float32) * is_answer
        for name in ("advantages", "old_logprobs", "sampler_logprobs", "old_values", "returns")
    }
    weight = (is_answer / 3).astype(np.float32)
    tokens = random.integers(0, 40, shape, dtype=np.int32)
    return {
        "tokens": tokens, "segments": np.ones(shape, np.int32), "is_answer": is_answer, **numbers,
        "weight": weight, "token_weight": weight,
    }  # fmt: skip


class ValuedTable(TableModel):
    """Log-probabilities from a table, and hidden states of width 1 that are the token ids."""

    def hidden_of(self, params, batch):
        return jnp.asarray(batch["tokens"], jnp.float32)[..., None] / 40


def test_the_loss_is_the_policys_and_the_critics_and_neither_teaches_the_other():
    batch = jax.tree.map(jnp.asarray, prepared(np.random.default_rng(0)))
    head = {"weight": jnp.ones(1), "bias": jnp.float32(0), "scale": jnp.float32(1)}
    start = {**random_params(0), "critic": {"model": {}, "head": head}}

    def losses(ppo):
        return jax.value_and_grad(lambda p: ppo.loss(ValuedTable(), p, batch), has_aux=True)(start)

    (both, metrics), gradient = losses(PPO(**SETTINGS, critic=Critic(loss_weight=0.5)))
    assert both == pytest.approx(float(metrics["policy/loss"] + 0.5 * metrics["value/loss"]), rel=1e-6)
    (_, _), without = losses(PPO(**SETTINGS, critic=Critic(loss_weight=0.0)))
    np.testing.assert_array_equal(gradient["model"]["logprobs"], without["model"]["logprobs"])
    assert not without["critic"]["head"]["weight"].any()
    assert gradient["critic"]["head"]["weight"].any()


def test_dual_clipping_bounds_what_a_token_can_cost():
    """Every token is far likelier than before and should become rarer: at most `largest` times its advantage."""
    batch = jax.tree.map(jnp.asarray, prepared(np.random.default_rng(0)))
    batch |= {"advantages": batch["is_answer"] * -1.0, "old_logprobs": batch["is_answer"] * -20.0}
    head = {"weight": jnp.ones(1), "bias": jnp.float32(0), "scale": jnp.float32(1)}
    start = {**random_params(0), "critic": {"model": {}, "head": head}}
    plain, bounded = (
        PPO(**SETTINGS, policy=policy).loss(ValuedTable(), start, batch)[1]["policy/loss"]
        for policy in (Clipped(), DualClipped(largest=3.0))
    )
    assert float(plain) > 100
    assert float(bounded) == pytest.approx(3.0, rel=1e-5)


def test_an_adaptive_coefficient_is_remembered():
    kl = Adaptive(coef=0.1, target=1.0, horizon=10.0, per_token=True)
    runtime, is_counted = Runtime(model=None, tokenizer=None), np.ones((2, 3), bool)
    log_ratio = np.full((2, 3), 1.0, np.float32)  # 3 nats an answer: above the target by more than a fifth
    assert kl_coefficient(runtime, kl, log_ratio, is_counted) == pytest.approx(0.1)
    assert kl_coefficient(runtime, kl, log_ratio, is_counted) == pytest.approx(0.1 * (1 + 0.2 * 2 / 10))
    assert runtime.log.metrics["kl/coef"] == pytest.approx(0.104)
