"""Order and collation."""

import numpy as np
import pytest

from rlhf.data.arithmetic import Arithmetic, preferences
from rlhf.data.batches import Batches, Order, collate, eval_batches
from rlhf.data.describe import describe_batch
from rlhf.errors import ConfigError
from rlhf.model.tokenizer import Tokenizer

TOKENIZER = Tokenizer()


def load(form, n=50, **settings):
    return Arithmetic(max_length=128, n_train=n, **{"packing": True, **settings}).load("train", form, TOKENIZER)


@pytest.mark.parametrize(
    ("form", "name"), [("conversation", ""), ("preference", ""), ("unpaired", ""), ("unpaired", "kl_")]
)
def test_what_is_scored_is_what_is_trained_on(form, name):
    examples = load(form, packing=False)
    batch = collate(examples, range(8))
    is_answer, scored = batch[f"{name}is_answer"], batch[f"{name}scored"]
    assert scored.shape[:-1] == is_answer.shape[:-1]
    assert scored.shape[-1] == examples.n_scored < examples.n_time
    for marks, places in zip(
        is_answer.reshape(-1, is_answer.shape[-1]), scored.reshape(-1, scored.shape[-1]), strict=True
    ):
        assert places[places > 0].tolist() == np.flatnonzero(marks).tolist()


def test_all_is_scored_where_most_is_trained_on():
    for settings in ({"loss_on": "all", "packing": False}, {"loss_on": "all"}):
        examples = load("conversation", **settings)
        assert examples.n_scored is None
        assert "scored" not in collate(examples, range(4))
    assert load("graded").n_scored is None


@pytest.mark.parametrize(("n_rows", "batch_size"), [(10, 5), (10, 3), (7, 16), (1, 1), (64, 32)])
def test_each_epoch_is_a_permutation_without_gaps(n_rows, batch_size):
    order = Order(n_rows, batch_size, seed=3)
    n_steps = 5 * n_rows
    stream = np.concatenate([order.rows(step) for step in range(n_steps)])
    epochs = stream[: n_steps * batch_size // n_rows * n_rows].reshape(-1, n_rows)
    assert all(sorted(epoch) == list(range(n_rows)) for epoch in epochs.tolist())
    if n_rows == 64:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)


def test_the_order_is_a_function_of_seed_and_step():
    forward = Order(50, 8, seed=1)
    rows = [forward.rows(step).tolist() for step in range(40)]
    assert Order(50, 8, seed=1).rows(37).tolist() == rows[37]
    backward = Order(50, 8, seed=1)
    assert [backward.rows(step).tolist() for step in reversed(range(40))][::-1] == rows
    assert Order(50, 8, seed=2).rows(0).tolist() != rows[0]


def test_the_first_permutation_is_numpys():
    expected = np.random.default_rng([7, 0]).permutation(10)
    np.testing.assert_array_equal(Order(10, 10, seed=7).rows(0), expected)


def test_steps_of_some_epochs():
    order = Order(10, 4, seed=0)
    assert [order.steps(epochs) for epochs in (0.4, 1, 2, 3)] == [1, 3, 5, 8]


def test_a_conversation_batch_by_hand():
    examples = load("conversation", packing=False)
    batch = collate(examples, [3, 0])
    row = examples.sequences[3][0]
    n = len(row.tokens)
    np.testing.assert_array_equal(batch["tokens"][0, :n], row.tokens)
    np.testing.assert_array_equal(batch["is_answer"][0, :n], row.is_answer)
    np.testing.assert_array_equal(batch["positions"][0, :n], np.arange(n))
    assert set(batch["segments"][0, :n].tolist()) == {1}
    for name in ("tokens", "is_answer", "segments", "positions"):
        assert not batch[name][0, n:].any()
        assert batch[name].shape == (2, examples.n_time)
    assert batch["row"].tolist() == [3, 0]
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32", "is_answer": "bool", "segments": "int32", "positions": "int32", "row": "int32",
        "scored": "int32",
    }  # fmt: skip


def test_pad_is_not_eos_and_never_counts():
    examples = load("conversation", packing=False)
    batch = collate(examples, range(50))
    padding = batch["segments"] == 0
    assert set(batch["tokens"][padding].tolist()) == {TOKENIZER.pad}
    assert TOKENIZER.pad != TOKENIZER.eos
    assert not batch["is_answer"][padding].any()
    ends = (batch["tokens"] == TOKENIZER.end_of_turn) & batch["is_answer"]
    assert (ends.sum(axis=1) >= 1).all()  # the model learns to stop


def test_packed_rows_hold_every_token_once():
    examples = load("conversation", n=200)
    assert len(examples.packs) < 120
    batch = collate(examples, range(len(examples.packs)))
    assert batch["row"].tolist() == [pack[0] for pack in examples.packs]
    for place, pack in enumerate(examples.packs):
        for segment, index in enumerate(pack, start=1):
            inside = batch["segments"][place] == segment
            row = examples.sequences[index][0]
            np.testing.assert_array_equal(batch["tokens"][place, inside], row.tokens)
            np.testing.assert_array_equal(batch["is_answer"][place, inside], row.is_answer)
            np.testing.assert_array_equal(batch["positions"][place, inside], np.arange(len(row.tokens)))
        assert batch["segments"][place].max() == len(pack)


def test_preference_batches_have_both_answers():
    examples = load("preference")
    batch = Batches(examples, 4, seed=0)[2]
    assert batch["tokens"].shape == (4, 2, examples.n_time)
    for place, row in enumerate(batch["row"]):
        for side in (0, 1):
            tokens = examples.sequences[row][side].tokens
            np.testing.assert_array_equal(batch["tokens"][place, side, : len(tokens)], tokens)


def test_batches_are_random_access():
    examples = load("conversation")
    batches = Batches(examples, 6, seed=5)
    assert (batches.n_rows, batches.fingerprint) == (len(examples.packs), examples.fingerprint)
    later = batches[9]
    assert [batches[step]["row"].tolist() for step in range(10)][9] == later["row"].tolist()
    assert later["row"].tolist() == [examples.packs[row][0] for row in Order(len(examples.packs), 6, 5).rows(9)]


def test_mismatched_answers_for_the_kl_estimate():
    examples = load("unpaired")
    batch = collate(examples, [0, 1, 2, 3])  # 0 and 1 answer one prompt, 2 and 3 another
    assert batch["is_desirable"].tolist() == [True, False, True, False]
    for place, answered in enumerate([2, 2, 0, 0]):
        asked, other = examples.sequences[place][0], examples.sequences[answered][0]
        expected = [*asked.tokens[: asked.n_prompt], *other.tokens[other.n_prompt :]]
        n = len(expected)
        assert batch["kl_tokens"][place, :n].tolist() == expected
        assert batch["kl_is_answer"][place].sum() == other.is_answer.sum()
        assert not batch["kl_is_answer"][place, : asked.n_prompt].any()
        assert batch["kl_segments"][place].sum() == n
        np.testing.assert_array_equal(batch["kl_positions"][place, :n], np.arange(n))


def test_one_prompt_alone_takes_the_next_answer():
    examples = load("unpaired")
    batch = collate(examples, [0, 1])
    other = examples.sequences[1][0]
    n_prompt = examples.sequences[0][0].n_prompt
    assert batch["kl_tokens"][0, n_prompt : len(other.tokens)].tolist() == other.tokens[n_prompt:].tolist()


def test_an_unpaired_batch_of_one_is_refused():
    with pytest.raises(ConfigError, match=r"algorithm.batch_size=1 must be at least 2"):
        Batches(load("unpaired"), 1, seed=0)


@pytest.mark.parametrize("form", ["conversation", "preference", "unpaired", "prompt"])
def test_evaluation_sees_every_example_once(form):
    examples = load(form, n=21)
    batches = list(eval_batches(examples, 8))
    rows = np.concatenate([batch["row"] for batch in batches])
    assert rows[: len(examples)].tolist() == list(range(len(examples)))
    assert set(rows[len(examples) :].tolist()) == {-1}
    last = batches[-1]
    filler = last["row"] == -1
    assert filler.any()
    for name in ("is_answer", "segments", *(["kl_is_answer", "is_desirable"] if form == "unpaired" else [])):
        assert not last[name][filler].any()
    assert all(batch["tokens"].shape == batches[0]["tokens"].shape for batch in batches)


def test_a_batch_described():
    examples = load("preference")
    batch = collate(examples, [4])
    text = describe_batch(batch, TOKENIZER, 1)
    question = preferences("train", 50)[4]["prompt"]
    assert f"<bos><start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n" in text
    assert "--- row 4 of the dataset, chosen ---" in text
    assert "--- row 4 of the dataset, rejected ---" in text
    assert f"tokens 1 × 2 × {examples.n_time} (batch × (chosen, rejected) × time)" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["0", "2", "<bos>", "1", "0"] in lines
    n_prompt = examples.sequences[4][0].n_prompt
    assert sum(line[-1:] == ["*"] for line in lines) == batch["is_answer"].sum()
    assert next(line for line in lines if line[:1] == [str(n_prompt)])[-1] == "*"


def test_a_packed_batch_described():
    examples = load("conversation", n=40)
    pack = next(number for number, group in enumerate(examples.packs) if len(group) == 2)
    text = describe_batch(collate(examples, [pack]), TOKENIZER)
    assert text.count("<bos><start_of_turn>user") == 2
    assert f"{(collate(examples, [pack])['segments'] == 0).sum()} of padding" in text
    assert " 2         0" in text  # the second example's first position
