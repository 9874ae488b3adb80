"""The embedded data: deterministic, disjoint by chain, in the row forms of the public sets; faults are faults."""

import collections
import hashlib
import itertools
import json
import random
import re

import pytest

from rlhf.data.arithmetic import Arithmetic, conversations, draw_chains, preferences, problems
from rlhf.data.chains import KINDS, SPLITS, Chain, Step, canonical, chains, split_of, splits_by_chain
from rlhf.data.encode import Examples
from rlhf.data.stories import FAULTS, spoil
from rlhf.errors import ConfigError
from rlhf.model.tokenizer import Tokenizer

EQUATION = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")


def chain_in(text: str) -> tuple[str, ...]:
    """The distinct equations of a text, without results, operands of sums and products in order."""
    found = []
    for left, sign, right, _ in EQUATION.findall(text):
        pair = sorted((int(left), int(right))) if sign in "+*" else [int(left), int(right)]
        found.append(f"{pair[0]}{sign}{pair[1]}")
    return tuple(dict.fromkeys(found))


def chains_in(text: str) -> set[str]:
    """Every two equations that follow each other."""
    steps = [Step(int(left), sign, int(right), int(end)) for left, sign, right, end in EQUATION.findall(text)]
    return {canonical(pair) for pair in itertools.pairwise(steps)}


def are_right(text: str) -> bool:
    results = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    return all(results[sign](int(a), int(b)) == int(c) for a, sign, b, c in EQUATION.findall(text))


def final(text: str) -> str | None:
    found = re.findall(r"^#### (\d+)$", text, re.MULTILINE)
    return found[-1] if found else None


def all_texts(split, n):
    """Every answer of every form, one string a row."""
    for row in problems(split, n):
        yield row["answer"]
    for row in conversations(split, n):
        yield "\n".join(turn["content"] for turn in row["messages"] if turn["role"] == "assistant")
    for row in preferences(split, n):
        yield row["chosen"][-1]["content"]
        yield row["rejected"][-1]["content"]


def test_the_same_rows_everywhere():
    rows = [make(split, 200, 3) for make in (problems, conversations, preferences) for split in SPLITS]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest == "24c21449c892c9e078f55d2282934b9a98c02be6bee9ba7cb007a7101921d0a9"
    assert problems("train", 20, 3) != problems("train", 20, 4)


def test_splits_are_disjoint_by_chain():
    """No equation chain of a test or validation answer is in a training row, in whatever words, of whatever form."""
    seen = {chain_in(text) for text in all_texts("train", 3000)}
    assert len(seen) > 2500
    for split in ("validation", "test"):
        solved = [chain_in(text) for text in all_texts(split, 600) if are_right(text)]
        assert len(set(solved)) > 150
        assert not seen.intersection(solved)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_two_equations_behind_each_other_are_a_chain_of_another_split(seed):
    """Of all 6,000 pairs that are trained on: a rambling answer repeats a step, and so may make another chain."""
    for row in preferences("train", 6000, seed):
        for side in ("chosen", "rejected"):
            found = {splits_by_chain().get(chain, "train") for chain in chains_in(row[side][-1]["content"])}
            assert found <= {"train"}, row


def test_swapped_operands_are_the_same_chain():
    assert Chain(12, "+-", 7, 5).canonical == Chain(7, "+-", 12, 5).canonical == "7+12 19-5"
    assert Chain(3, "*+", 4, 9).canonical == Chain(4, "*+", 3, 9).canonical == "3*4 9+12"
    assert Chain(12, "-+", 7, 5).canonical == "12-7 5+5"


def test_there_are_enough_chains():
    sizes = {split: sum(map(len, kinds.values())) for split, kinds in chains().items()}
    assert sizes["train"] > 2000
    assert sizes["test"] > 512
    assert {split_of(chain) for chain in chains()["test"]["++"]} == {"test"}
    everything = [chain for kinds in chains().values() for found in kinds.values() for chain in found]
    assert all(0 < step.result < 100 for chain in everything for step in chain.steps)
    assert len({chain.canonical for chain in everything}) == 3857


def test_evaluation_rows_hardly_repeat_a_chain():
    drawn = list(itertools.islice(draw_chains("test", 0, "problems"), 512))
    assert len(set(drawn)) > 500
    assert {chain.signs for chain in drawn} == set(KINDS)


def test_problems_have_gsm8ks_form_and_are_right():
    for row in problems("test", 500):
        assert set(row) == {"question", "answer"}
        assert are_right(row["answer"])
        last = EQUATION.findall(row["answer"])[-1][-1]
        assert row["answer"].split("\n")[-1] == f"#### {last}"
        numbers = re.findall(r"\d+", row["question"])
        first, second = EQUATION.findall(row["answer"])
        assert numbers == [first[0], first[2], second[2]]


def test_conversations_have_the_form_of_no_robots():
    rows = conversations("train", 1000)
    shapes = collections.Counter(tuple(turn["role"] for turn in row["messages"]) for row in rows)
    assert set(shapes) == {("user", "assistant"), ("user", "assistant") * 2, ("system", "user", "assistant")}
    assert 70 < shapes["user", "assistant", "user", "assistant"] < 130
    assert 70 < shapes["system", "user", "assistant"] < 130
    for row in rows:
        assert set(row) == {"prompt", "prompt_id", "messages", "category"}
        users = [turn["content"] for turn in row["messages"] if turn["role"] == "user"]
        assert row["prompt"] == users[0]
        assert row["prompt_id"] == hashlib.sha256(users[0].encode()).hexdigest()
        assert all(are_right(turn["content"]) for turn in row["messages"])


def test_the_second_question_goes_on_from_the_first():
    for row in conversations("train", 500):
        answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        if len(answers) == 2:
            assert EQUATION.findall(answers[1])[0][0] == final(answers[0])


def test_preferences_have_the_columns_of_capybara(shared):
    real = json.loads((shared / "data/capybara_dpo_form/test.jsonl").read_text().split("\n")[0])
    for row in preferences("train", 300):
        assert list(row) == list(real)
        assert {key: type(row[key]) for key in row} == {key: type(real[key]) for key in real}
        assert row["chosen"][:-1] == row["rejected"][:-1]
        assert row["rating_chosen"] > row["rating_rejected"]
        assert are_right(row["chosen"][-1]["content"])
        assert row["rejected_model"] in FAULTS


def test_faults_are_faults():
    counts = collections.Counter()
    for row in preferences("train", 2000):
        right, wrong = row["chosen"][-1]["content"], row["rejected"][-1]["content"]
        fault = row["rejected_model"]
        counts[fault] += 1
        if fault == "wrong_step":
            assert are_right(wrong)
            assert chain_in(wrong) != chain_in(right)
            assert final(wrong) != final(right)
        elif fault == "wrong_number":
            assert not are_right(wrong)
            assert final(wrong) != final(right)
            assert final(wrong) == EQUATION.findall(wrong)[-1][-1]
        elif fault == "missing_format":
            assert "####" not in wrong
            assert are_right(wrong)
            assert EQUATION.findall(wrong) == EQUATION.findall(right)
        else:
            assert are_right(wrong)
            assert final(wrong) == final(right)
            assert chain_in(wrong) == chain_in(right)
            assert len(wrong.split("\n")) == len(right.split("\n")) + 3
    assert min(counts.values()) > 350, counts


def test_a_fault_that_gives_no_wrong_answer_is_not_taken():
    """A wrong step leads to another result, through a chain of the same split."""
    for seed in range(50):
        for chain in (Chain(4, "+-", 4, 4), Chain(3, "++", 2, 9), Chain(20, "-+", 2, 2)):
            text = spoil(chain, "wrong_step", random.Random(seed))
            if text is not None:
                (a, first, b, _), (_, second, c, _) = EQUATION.findall(text)
                other = Chain(int(a), first + second, int(b), int(c))
                assert split_of(other) == split_of(chain)
                assert 0 < other.result != chain.result


@pytest.mark.parametrize("form", ["conversation", "preference", "unpaired", "prompt"])
def test_every_form_loads_and_is_short(form):
    examples: Examples = Arithmetic(max_length=128, n_train=300).load("train", form, Tokenizer())
    assert len(examples) == (600 if form == "unpaired" else 300)
    lengths = [len(row.tokens) for rows in examples.sequences for row in rows]
    assert max(lengths) <= {"conversation": 80, "prompt": 40}.get(form, 90)
    assert examples.sources[0].place.startswith("arithmetic train ")
    if form == "prompt":
        assert examples.prompts[0].answer == final(examples.prompts[0].fields["answer"])


def test_the_evaluation_split_is_chosen_by_its_name():
    tokenizer = Tokenizer()
    places = {
        split: Arithmetic(max_length=128, eval_split=split, n_eval=5).load("eval", "prompt", tokenizer).sources[0].place
        for split in ("validation", "test")
    }
    assert places == {s: f"arithmetic {s} problems row 0" for s in places}
    with pytest.raises(ConfigError, match=r"dataset.eval_split='dev' must be one of train, validation, test"):
        Arithmetic(max_length=128, eval_split="dev")
