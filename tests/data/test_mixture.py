"""Graded rows of every kind, and several datasets as one."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from rlhf.data.arithmetic import Arithmetic
from rlhf.data.batches import Batches, eval_batches
from rlhf.data.dataset import Table
from rlhf.data.examples import LABEL, PAIR, SCORE, Preference, Scored
from rlhf.data.mixture import Mixture
from rlhf.data.rows import Preferences, Scores
from rlhf.errors import ConfigError, DataError
from rlhf.model.chat import Message
from rlhf.model.tokenizer import Tokenizer

TOKENIZER = Tokenizer()
U = Message("user", "q")
TALK = "\n\nHuman: q\n\nAssistant: a"


def arithmetic(grades: str, n: int, seed: int = 0) -> Arithmetic:
    return Arithmetic(max_length=128, grades=grades, n_train=n, n_eval=4, seed=seed)


@pytest.fixture(scope="module")
def mixture():
    parts = {"pairs": arithmetic("pair", 20), "labels": arithmetic("label", 30), "scores": arithmetic("score", 10)}
    return Mixture(parts=parts, weights={"pairs": 3, "labels": 1, "scores": 2.0})


def test_each_part_has_its_share_of_the_training_rows(mixture):
    examples = mixture.load("train", "graded", TOKENIZER)
    kinds = collections.Counter(examples.grades[pack[0]].kind for pack in examples.packs)
    assert kinds == {PAIR: 30, LABEL: 10, SCORE: 20}  # of 60 rows in all
    seen = collections.Counter(examples.packs)
    assert set(seen.values()) == {1, 2}  # the 20 pairs and the 10 rated answers come again, the labels do not
    assert sum(n == 2 for n in seen.values()) == 20
    assert Batches(examples, 6, 0).n_rows == 60


def test_evaluation_has_every_row_once(mixture):
    examples = mixture.load("eval", "graded", TOKENIZER)
    batch = next(eval_batches(examples, len(examples)))
    assert batch["row"].tolist() == list(range(12))
    assert batch["kind"].tolist() == [PAIR, LABEL, SCORE] * 4
    np.testing.assert_array_equal(batch["value"][1::3], [1, 0, 1, 0])  # right, spoilt, right, spoilt
    assert set(batch["value"][2::3].tolist()) <= {1, 2, 3, 5}
    single = batch["kind"] != PAIR
    assert not batch["segments"][single, 1].any()
    assert batch["is_answer"][~single].any(axis=-1).all()


@pytest.mark.parametrize("form", ["graded", "prompt", "unpaired"])
def test_evaluation_deals_its_rows_over_the_parts(form):
    sizes = {"a": 1, "b": 3, "c": 2}
    parts = {name: dataclasses.replace(arithmetic("pair", 8, n), n_eval=n) for name, n in sizes.items()}
    dealt = Mixture(parts=parts, weights=dict.fromkeys(parts, 1)).load("eval", form, TOKENIZER)
    alone = {name: part.load("eval", form, TOKENIZER) for name, part in parts.items()}
    rows = [(name, row) for row in range(6) for name in parts if row < len(alone[name])]
    assert len(dealt) == len(rows) == sum(map(len, alone.values()))
    assert dealt.packs == [(row,) for row in range(len(rows))]
    for field in ("sources", "is_desirable", "grades", "pictures"):
        expected = [getattr(alone[name], field)[row] for name, row in rows] if getattr(alone["a"], field) else []
        assert getattr(dealt, field) == expected
    for rows_of, (name, row) in zip(dealt.sequences, rows, strict=True):
        for one, other in zip(rows_of, alone[name].sequences[row], strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
    if form == "prompt":
        asked = [dataclasses.replace(alone[name].prompts[row], row=new) for new, (name, row) in enumerate(rows)]
        assert dealt.prompts == asked


def test_a_limit_keeps_the_shares(mixture):
    examples = dataclasses.replace(mixture, limit=6).load("train", "graded", TOKENIZER)
    assert len(examples) == len(examples.packs) == len(examples.sources) == 6
    kinds = collections.Counter(examples.grades[pack[0]].kind for pack in examples.packs)
    assert kinds == {PAIR: 3, LABEL: 1, SCORE: 2}
    prompts = dataclasses.replace(mixture, limit=4).load("train", "prompt", TOKENIZER).prompts
    assert [prompt.row for prompt in prompts] == list(range(4))
    whole = dataclasses.replace(mixture, limit=1000).load("train", "graded", TOKENIZER)
    assert (len(whole.packs), len(whole)) == (60, 40)  # 20 of the 30 labels have no place
    with pytest.raises(ConfigError, match="limit=0 of Mixture must be at least 1"):
        dataclasses.replace(mixture, limit=0)


def test_rows_of_a_part_are_those_of_the_part_alone(mixture):
    alone = arithmetic("score", 10).load("train", "graded", TOKENIZER)
    together = mixture.load("train", "graded", TOKENIZER)
    for index in range(10):
        one, other = alone.sequences[index][0], together.sequences[50 + index][0]
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert alone.grades[index] == together.grades[50 + index]


def test_another_weight_or_seed_is_another_run(mixture):
    prints = {
        Mixture(parts=mixture.parts, weights=weights, seed=seed).load("train", "graded", TOKENIZER).fingerprint
        for weights, seed in (
            ({"pairs": 3, "labels": 1, "scores": 2}, 0),
            ({"pairs": 3, "labels": 1, "scores": 2}, 1),
            ({"pairs": 1, "labels": 1, "scores": 1}, 0),
        )
    }
    assert len(prints) == 3


def test_pairs_alone_have_no_kind(tmp_path):
    examples = arithmetic("pair", 8).load("train", "graded", TOKENIZER)
    batch = Batches(examples, 4, 0)[0]
    assert "kind" not in batch
    assert set(batch["value"].tolist()) <= {2, 3, 4}  # 5 for the right answer, less the rating of the spoilt one


def test_a_mixture_serves_other_forms_too(mixture):
    parts = {"one": arithmetic("pair", 20), "two": arithmetic("pair", 20, 7)}
    both = Mixture(parts=parts, weights={"one": 1, "two": 1})
    assert len(both.load("train", "conversation", TOKENIZER)) == 40
    prompts = both.load("eval", "prompt", TOKENIZER).prompts
    assert [prompt.row for prompt in prompts] == list(range(8))


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"a": 1, "b": 1}, "dataset.weights.b belongs to no part"),
        ({}, "dataset.weights.a is missing: every part of a mixture has a weight"),
        ({"a": 0}, "dataset.weights.a=0 must be above 0"),
    ],
)
def test_weights_belong_to_parts(weights, reason):
    with pytest.raises(ConfigError, match=reason):
        Mixture(parts={"a": arithmetic("pair", 4)}, weights=weights)


def test_a_part_that_cannot_serve_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a", "score": 1}))
    scores = Table(rows=Scores(), path=str(tmp_path / "rows.jsonl"), max_length=64)
    mixed = Mixture(parts={"mine": scores}, weights={"mine": 1})
    with pytest.raises(ConfigError, match=r"dataset\.parts\.mine: the algorithm trains on rows of form 'preference'"):
        mixed.check("preference")
    mixed.check("graded")


@pytest.mark.parametrize(
    ("margin", "expected"),
    [(None, None), ("margin", 1.5), (("good", "bad"), 4.0)],
    ids=["none", "column", "two columns"],
)
def test_margins_of_preferences(margin, expected):
    fields = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1.5, "good": 5, "bad": 1}
    assert Preferences(prompt="prompt", margin=margin)(fields) == Preference((U,), "a", "b", expected)


def test_scores_are_numbers():
    fields = {"prompt": "q", "completion": [{"role": "assistant", "content": "a"}], "score": 3}
    assert Scores()(fields) == Scored((U,), "a", 3.0)
    for bad in (True, "3", float("nan")):
        with pytest.raises(DataError, match="column 'score' must be a finite number"):
            Scores()({**fields, "score": bad})
    for bad in (10**400, -2e18):
        with pytest.raises(DataError, match=r"column 'score' must be within ±1e\+18, so that float32 holds its square"):
            Scores()({**fields, "score": bad})
        with pytest.raises(DataError, match="column 'margin' must be within"):
            Preferences(margin="margin")({"chosen": TALK, "rejected": TALK, "margin": bad})
    assert Scores()({**fields, "score": -(10**18)}).score == -1e18


def test_numbers_too_large_are_refused_with_their_line_or_left_out(tmp_path):
    rows = [{"prompt": "q", "completion": "a", "score": score} for score in (1, 10**400, 3e18)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    scores = Table(rows=Scores(), path=str(path), max_length=64)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: column 'score' must be within"):
        scores.load("train", "graded", TOKENIZER)
    assert len(dataclasses.replace(scores, on_bad_row="skip").load("train", "graded", TOKENIZER)) == 1
