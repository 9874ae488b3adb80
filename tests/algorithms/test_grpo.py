"""GRPO's prepare and loss on a policy that is a table: numbers by hand, identities, options that must do something."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bandit import MODEL, batch, runtime

from rlhf.algorithms.groups import DropFlat, Resample
from rlhf.algorithms.grpo import GRPO
from rlhf.algorithms.rollouts import ATTEMPTS_APART, roll_out
from rlhf.algorithms.saved_rollouts import save_rollouts
from rlhf.errors import ConfigError, DataError
from rlhf.ops.advantages import BatchWhitened, GroupCentred, Plain
from rlhf.ops.kl import K1, InLoss, InReward, NoKL
from rlhf.ops.policy import TruncatedImportance
from rlhf.ops.truncation import MaskTruncated, PenaliseTruncated
from rlhf.ops.weights import PerToken
from rlhf.sampling.methods import Sample

KEY = jax.random.key(0)
PARAMS = {"model": jnp.array([0.5, 0.0, 1.0, -1.0])}
OTHER = np.array([0.0, 0.4, -0.2, 0.1], np.float32)
SETTINGS = {"learning_rate": 1e-3, "batch_size": 4, "group_size": 4, "microbatch_size": 4, "max_new_tokens": 4}


def grpo(**changes) -> GRPO:
    return GRPO(**{**SETTINGS, "kl": NoKL(), **changes})


def by_text(answer) -> float:
    return float(answer.completion.count("2"))


def prepared(algorithm, rt, params=PARAMS, rows=(0, 1, 2, 3)):
    made = algorithm.prepare(rt, params, batch(*rows), KEY)
    return {name: jnp.asarray(value) for name, value in made.items()}


def gradient_of(algorithm, made, params=PARAMS):
    (loss, metrics), gradient = jax.value_and_grad(lambda p: algorithm.loss(MODEL, p, made), has_aux=True)(params)
    return loss, metrics, gradient["model"]


def test_a_batch_has_the_answers_behind_their_prompts():
    rt = runtime(by_text)
    made = prepared(grpo(), rt)
    assert made["tokens"].shape == (16, 8)  # 3 + 4 tokens, rounded up to 8
    n_prompt = np.array([2, 3, 2, 3]).repeat(4)
    n_answer = np.asarray(made["is_answer"].sum(axis=1))
    first = np.asarray(made["is_answer"]).argmax(axis=1)
    np.testing.assert_array_equal(first, n_prompt)
    np.testing.assert_array_equal(made["segments"].sum(axis=1), n_prompt + n_answer)
    np.testing.assert_array_equal(made["row"], np.arange(4).repeat(4))
    # the sampler's numbers are the trainer's
    trained = MODEL.token_logprobs(PARAMS, made) * made["is_answer"]
    np.testing.assert_allclose(made["sampler_logprobs"], trained, atol=1e-6)


def test_rewards_of_whole_numbers_and_fractions_give_fractions():
    for unit in (1, 0.25):
        rt = runtime(lambda answer, unit=unit: unit * answer.completion.count("2"))
        made = prepared(grpo(advantage=GroupCentred()), rt)
        rewards = np.array([unit * row["text"].count("2") for row in rt.log.rollouts])
        advantages = np.array([row["advantage"] for row in rt.log.rollouts])
        rows = np.array([row["row"] for row in rt.log.rollouts])
        for row in range(4):
            group = rewards[rows == row]
            np.testing.assert_allclose(advantages[rows == row], group - group.mean(), atol=1e-6)
        assert made["advantages"].dtype == jnp.float32


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_before_the_first_update_nothing_has_moved(minibatches, temperature):
    algorithm = grpo(minibatches=minibatches, kl=InLoss(), method=Sample(temperature=temperature, top_k=50))
    made = prepared(algorithm, runtime(by_text, reference=np.asarray(PARAMS["model"])))
    assert ("old_logprobs" in made) == (minibatches > 1)
    _, metrics, _ = gradient_of(algorithm, made)
    found = {name: float(value) for name, value in metrics.items()}
    assert found["policy/ratio/max"] == 1.0
    assert abs(found["policy/ratio"] - 1) < 1e-6
    assert [found[f"policy/clipfrac{name}"] for name in ("", "_low", "_high")] == [0, 0, 0]
    for name in ("policy/approx_kl", "kl/k1", "kl/k2", "kl/k3"):
        assert abs(found[name]) < 1e-6, name
    assert found["sampling/logp_difference"] < 1e-6


def test_a_group_without_spread_has_no_advantage_and_no_gradient():
    rt = runtime(lambda answer: 0.1 if answer.row == 0 else by_text(answer))
    algorithm = grpo()
    made = prepared(algorithm, rt)
    assert not made["advantages"][:4].any()
    assert made["advantages"][4:].any()
    assert np.isfinite(made["advantages"]).all()
    assert rt.log.metrics["groups/zero_variance"] == 0.25
    kept = gradient_of(algorithm, made)[2]
    np.testing.assert_allclose(gradient_of(algorithm, {k: v[4:] for k, v in made.items()})[2] * 3 / 4, kept, rtol=1e-5)


def test_dropped_groups_are_in_no_mean():
    rt = runtime(lambda answer: 0.1 if answer.row == 0 else by_text(answer))
    made = prepared(grpo(groups=DropFlat(), weighting=PerToken()), rt)
    n_tokens = made["is_answer"].sum(axis=1)
    np.testing.assert_allclose(made["weight"].sum(axis=1)[4:], n_tokens[4:] * 16 / n_tokens[4:].sum(), rtol=1e-6)
    assert not made["weight"][:4].any()
    assert rt.log.metrics["answers/kept"] == 0.75


def test_an_answer_that_could_not_be_judged_counts_nowhere():
    is_bad = lambda answer: answer.row == 1 and answer.completion.startswith("2")  # noqa: E731
    rt = runtime(lambda answer: None if is_bad(answer) else by_text(answer))
    made = prepared(grpo(advantage=GroupCentred()), rt)
    bad = np.array([row["text"].startswith("2") for row in rt.log.rollouts if row["row"] == 1])
    assert 0 < bad.sum() < 4
    group = [row for row in rt.log.rollouts if row["row"] == 1]
    judged = [row["reward"] for row in group if not row["text"].startswith("2")]
    for row in group:
        expected = 0 if row["text"].startswith("2") else row["reward"] - np.mean(judged)
        np.testing.assert_allclose(row["advantage"], expected, atol=1e-6)
    assert rt.log.metrics["reward/invalid"] == bad.sum() / 16
    assert int((made["weight"].sum(axis=1) == 0).sum()) == bad.sum()


def test_dynamic_sampling_fills_the_batch_with_new_prompts():
    """Only every fourth prompt has answers that differ; 4 of 4 groups are wanted."""
    rt = runtime(lambda answer: by_text(answer) if answer.row % 4 == 0 else 1.0)
    rt.step = 5
    algorithm = grpo(groups=Resample(max_attempts=20))
    made = prepared(algorithm, rt)
    assert set(np.asarray(made["row"]) % 4) == {0}
    told = rt.log.metrics
    assert told["groups/missing"] == 0
    assert told["groups/attempts"] == len(rt.generate.calls) - 1 > 1
    assert told["groups/tried"] == sum(len(call["rows"]) for call in rt.generate.calls)
    np.testing.assert_allclose(told["groups/zero_variance"], 1 - 4 / told["groups/tried"], atol=0.25)
    assert int(rt.memory["n_more_prompts"]) == told["groups/tried"] - 4
    # each rollout has noise of its own, and all one compiled shape
    assert [call["step"] for call in rt.generate.calls] == [
        5 + ATTEMPTS_APART * attempt for attempt in range(len(rt.generate.calls))
    ]
    assert len({call["shape"] for call in rt.generate.calls}) == 1
    # the next step goes on where this one ended
    prepared(algorithm, rt)
    assert int(rt.memory["n_more_prompts"]) > told["groups/tried"] - 4


def test_dynamic_sampling_ends(caplog):
    rt = runtime(lambda answer: 1.0)
    prepared(grpo(groups=Resample(max_attempts=2)), rt)
    assert rt.log.metrics["groups/attempts"] == 2
    assert rt.log.metrics["groups/missing"] == 4
    assert "all 16 answers have the reward 1: nothing can be compared" in caplog.text


def test_cut_answers_are_masked_or_cost_something():
    rt = runtime(by_text)
    made = prepared(grpo(truncation=MaskTruncated()), rt)
    is_cut = np.asarray(made["is_answer"].sum(axis=1) == 3) & (np.asarray(made["tokens"])[:, -1] >= 0)
    cut = {(row["row"], row["text"]) for row in rt.log.rollouts if row["finish_reason"] == "length"}
    assert cut
    assert rt.log.metrics["answers/kept"] == 1 - rt.log.metrics["sampling/truncated"]
    assert int((made["weight"].sum(axis=1) == 0).sum()) == 16 * rt.log.metrics["sampling/truncated"]
    assert is_cut.any()
    plain = prepared(grpo(advantage=Plain()), runtime(by_text))
    less = prepared(grpo(advantage=Plain(), truncation=PenaliseTruncated(penalty=0.5)), runtime(by_text))
    lost = np.unique(np.asarray(plain["advantages"] - less["advantages"]))
    np.testing.assert_allclose(lost, [0, 0.5])


def test_divergence_in_the_reward_is_taken_off_before_or_after_the_baseline():
    reference = runtime(by_text, reference=OTHER)
    whole = prepared(grpo(advantage=Plain(), kl=InReward(coef=0.5)), reference)
    log_ratio = (whole["old_logprobs"] - whole["reference_logprobs"]) * whole["is_answer"]
    rewards = np.zeros(16)
    tokens = np.asarray(whole["tokens"])
    for row in range(16):
        rewards[row] = (tokens[row][np.asarray(whole["is_answer"][row])] == 2).sum()
    expected = (rewards - 0.5 * log_ratio.sum(axis=1))[:, None] * whole["is_answer"]
    np.testing.assert_allclose(whole["advantages"], expected, rtol=1e-5, atol=1e-6)
    each = prepared(grpo(advantage=Plain(), kl=InReward(coef=0.5, per_token=True)), runtime(by_text, OTHER))
    later = np.cumsum(np.asarray(log_ratio)[:, ::-1], axis=1)[:, ::-1]
    expected = (rewards[:, None] - 0.5 * later) * whole["is_answer"]
    np.testing.assert_allclose(each["advantages"], expected, rtol=1e-5, atol=1e-6)
    white = prepared(grpo(advantage=BatchWhitened(), kl=InReward(coef=0.5, per_token=True)), runtime(by_text, OTHER))
    kept = np.asarray(white["advantages"])[np.asarray(white["is_answer"])]
    np.testing.assert_allclose([kept.mean(), kept.std(ddof=1)], [0, 1], atol=1e-5)


def test_without_divergence_there_is_no_reference():
    assert not grpo(kl=InLoss(coef=0.0)).needs_reference
    assert not grpo(kl=InReward(coef=0.0)).needs_reference
    assert grpo(kl=InLoss(coef=1e-6)).needs_reference
    made = prepared(grpo(kl=InLoss(coef=0.0)), runtime(by_text))  # whose reference is None
    assert "reference_logprobs" not in made
    assert "kl/k1" not in gradient_of(grpo(), made)[1]


def test_importance_weights_follow_the_difference_of_sampler_and_trainer():
    algorithm = grpo(correction=TruncatedImportance(largest=1.5), advantage=Plain(), weighting=PerToken())
    made = prepared(algorithm, runtime(by_text))
    made["sampler_logprobs"] = made["sampler_logprobs"].at[:, 2].add(-0.2).at[:, 3].add(-2.0)
    loss, metrics, _ = gradient_of(algorithm, made)
    weights = np.where(np.arange(8) == 2, np.exp(0.2), np.where(np.arange(8) == 3, 1.5, 1.0))
    answer = np.asarray(made["is_answer"])
    expected = -(np.asarray(made["advantages"]) * weights)[answer].mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    gap = (0.2 * answer[:, 2] + 2.0 * answer[:, 3]).sum() / answer.sum()
    np.testing.assert_allclose(metrics["sampling/logp_difference"], gap, rtol=1e-4)


def test_prompt_tokens_have_no_gradient():
    algorithm = grpo(kl=InLoss(), minibatches=2)
    made = prepared(algorithm, runtime(by_text, OTHER))
    before = gradient_of(algorithm, made)[2]
    tokens = jnp.where(made["is_answer"], made["tokens"], 3)
    np.testing.assert_array_equal(before, gradient_of(algorithm, {**made, "tokens": tokens})[2])


def test_saved_rollouts_give_the_same_batch_again(tmp_path):
    algorithm, rt, file = grpo(), runtime(by_text), tmp_path / "rollouts.jsonl"
    rollouts = roll_out(rt, PARAMS, batch(0, 1, 2, 3)["prompts"], algorithm)
    save_rollouts(file, rollouts, 1.0)
    again = grpo(replay=str(file))
    first, second = prepared(algorithm, runtime(by_text)), prepared(again, runtime(lambda answer: 1 / 0), rows=(9,) * 4)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row.pop("reward")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = prepared(again, runtime(lambda answer: 2 * by_text(answer)))  # no rewards there: scored anew
    np.testing.assert_array_equal(scored["tokens"], first["tokens"])
    cases = [
        ({"group_size": 8, "batch_size": 2, "microbatch_size": 8}, r"line 5: another prompt than its group of algo"),
        ({"batch_size": 8}, r"has 16 rollouts, and a batch needs 32 \(batch_size 8 × group_size 4\)"),
        ({"method": Sample(temperature=0.7)}, r"line 1 was generated at temperature 1, and algorithm.method.temp"),
        ({"max_new_tokens": 1}, r"line \d+: \d tokens, more than algorithm.max_new_tokens=1"),
        ({"replay": "nowhere.jsonl"}, r"algorithm.replay=nowhere.jsonl: there is no such file"),
    ]
    for changes, message in cases:
        with pytest.raises(DataError, match=message):
            prepared(grpo(**{"replay": str(file), **changes}), runtime(by_text))
    file.write_text('{"row": 1}\n')
    with pytest.raises(DataError, match="line 1 is no rollout: it lacks prompt, prompt_ids"):
        prepared(again, runtime(by_text))


def test_a_batch_with_nothing_to_learn_from_is_told_at_once_and_then_rarely(caplog):
    caplog.set_level(logging.WARNING)
    rt = runtime(lambda answer: 0.0)
    for step in range(9):
        rt.step = step
        prepared(grpo(), rt)
    told = [record.getMessage() for record in caplog.records]
    assert [message.split(":")[0] for message in told] == ["step 1", "step 2", "step 4", "step 8"]
    assert told[-1].endswith("(8 such batches so far)")
    caplog.clear()
    sure = {"model": jnp.array([50.0, 0, 0, 0])}
    prepared(grpo(), runtime(by_text), sure)
    assert "all 4 answers to each prompt are the same" in caplog.text
    caplog.clear()
    rt = runtime(lambda answer: None)
    prepared(grpo(), rt)
    assert "the reward could not judge any of the 16 answers" in caplog.text
    assert [(row["reward"], *row["rewards"].values()) for row in rt.log.rollouts] == [(None, None)] * 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "algorithm.group_size=1 must be at least 2: algorithm.advantage=GroupNormalised compares"),
        ({"method": Sample(temperature=0)}, "algorithm.method.temperature=0 is greedy"),
        ({"microbatch_size": 5}, r"algorithm.microbatch_size=5 must divide the 16 rows of an optimizer step"),
    ],
)
def test_settings_that_can_not_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        grpo(**changes)


def test_k1_in_the_loss_is_refused():
    with pytest.raises(ConfigError, match=r"kl.estimator=K1 in the loss has a gradient of zero expectation"):
        InLoss(estimator=K1())
