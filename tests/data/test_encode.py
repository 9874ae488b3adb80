"""Masks, truncation, packing and the fingerprint: decided once, where examples become tokens."""

import logging

import numpy as np
import pytest

from rlhf.data.dataset import Table
from rlhf.data.encode import Examples, Source, encode
from rlhf.data.examples import Conversation, Judged, Preference, Question, Scored
from rlhf.data.packing import pack
from rlhf.data.rows import Conversations
from rlhf.errors import DataError
from rlhf.model.chat import Message
from rlhf.model.tokenizer import Tokenizer

TOKENIZER = Tokenizer()
SYSTEM = Message("system", "Be brief.")


def talk(*texts: str) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    return tuple(Message(roles[number % 2], text) for number, text in enumerate(texts))


def encoded(*examples, form="conversation", **settings) -> Examples:
    settings = {"max_length": 64, **settings}
    dataset = Table(rows=Conversations(), path="unread.jsonl", **settings)
    found = [(Source(f"rows.jsonl:{number}", {}), example) for number, example in enumerate(examples, start=1)]
    return encode(found, form, TOKENIZER, dataset, "train")


def text(row, only=None) -> str:
    tokens = row.tokens if only is None else row.tokens[only]
    return TOKENIZER.decode(tokens.tolist(), show_control=True)


TWO = Conversation(talk("q1", "a1", "q2", "a2"))
END = "<end_of_turn>"


def test_which_tokens_are_trained_on():
    trained = {}
    for loss_on in ("assistant", "last", "all"):
        ((row,),) = encoded(TWO, loss_on=loss_on).sequences
        trained[loss_on] = text(row, row.is_answer)
        assert text(row, slice(row.n_prompt, None)) == f"a2{END}\n"
    assert trained == {
        "assistant": f"a1{END}a2{END}",
        "last": f"a2{END}",
        "all": text(row).removeprefix("<bos>"),
    }


def test_only_the_last_answers_of_a_preference_count():
    examples = encoded(Preference(talk("q1", "a1", "q2"), "good", "bad"), form="preference", loss_on="all")
    ((chosen, rejected),) = examples.sequences
    assert text(chosen, chosen.is_answer) == f"good{END}"
    assert text(rejected, rejected.is_answer) == f"bad{END}"
    assert chosen.n_prompt == rejected.n_prompt
    np.testing.assert_array_equal(chosen.tokens[: chosen.n_prompt], rejected.tokens[: rejected.n_prompt])


def test_judged_answers_and_prompts():
    judged = encoded(Judged(talk("q"), "a", False), Judged(talk("q"), "b", True), form="unpaired")
    assert judged.is_desirable == [False, True]
    assert text(judged.sequences[1][0], judged.sequences[1][0].is_answer) == f"b{END}"
    asked = encoded(Question(talk("q"), "1+1=2 #### 2", "2"), form="prompt")
    ((row,),) = asked.sequences
    assert text(row) == "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n"
    assert not row.is_answer.any()
    prompt = asked.prompts[0]
    assert (prompt.token_ids, prompt.answer, prompt.row) == (tuple(row.tokens.tolist()), "2", 0)


def test_the_time_axis_is_rounded_up():
    assert encoded(TWO, max_length=512).n_time == 32
    assert encoded(Conversation(talk("q", "1" * 30)), max_length=512).n_time == 48
    assert encoded(Conversation(talk("q", "1" * 30)), max_length=45).n_time == 45


LONG = Conversation(talk("q", "7" * 100))


def test_a_long_row_is_an_error_with_its_place():
    reason = (
        r"rows\.jsonl:2: 112 tokens, more than dataset.max_length=64; raise it, or set dataset.on_long=truncate "
        "or dataset.on_long=drop"
    )
    with pytest.raises(DataError, match=reason):
        encoded(TWO, LONG)


def test_only_pairs_are_said_to_share_their_prompt(caplog):
    pair = Preference(talk("q " * 20), "a", "b", None)
    score = Scored(talk("q"), "a", 1.0)
    said = []
    for examples in ([score], [score, pair]):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            encoded(*examples, form="graded")
        said.append("prompts are run once for both answers" in caplog.text)
    assert said == [False, True]


def test_long_rows_are_left_out_and_counted(caplog):
    with caplog.at_level(logging.INFO):
        examples = encoded(LONG, TWO, LONG, on_long="drop")
    assert (len(examples), examples.n_dropped) == (1, 2)
    assert examples.sources[0].place == "rows.jsonl:2"
    assert "train: 2 rows longer than 64 tokens left out, 0 cut" in caplog.messages
    with pytest.raises(DataError, match=r"all 1 rows for train are longer than dataset.max_length=64 tokens"):
        encoded(LONG, on_long="drop")


def test_an_answer_loses_its_end_and_gets_no_false_end_of_turn(caplog):
    with caplog.at_level(logging.INFO):
        examples = encoded(LONG, on_long="truncate")
    ((row,),) = examples.sequences
    assert len(row.tokens) == 64
    assert text(row) == "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n" + "7" * (64 - row.n_prompt)
    assert row.is_answer.sum() == 64 - row.n_prompt
    assert "train: 0 rows longer than 64 tokens left out, 1 cut" in caplog.messages


def test_a_prompt_loses_its_oldest_turns_first():
    messages = (SYSTEM, *talk("old" * 30, "older", "q2", "a2", "q3", "a3"))
    ((row,),) = encoded(Conversation(messages), on_long="truncate", max_length=48).sequences
    assert text(row) == (
        "<bos><start_of_turn>user\nBe brief.\n\nq2<end_of_turn>\n<start_of_turn>model\na2<end_of_turn>\n"
        "<start_of_turn>user\nq3<end_of_turn>\n<start_of_turn>model\na3<end_of_turn>\n"
    )
    assert text(row, row.is_answer) == f"a2{END}a3{END}"


def test_a_prompt_of_one_turn_loses_its_oldest_tokens():
    question = "".join(str(number % 10) for number in range(100))
    ((row,),) = encoded(Conversation(talk(question, "a")), on_long="truncate").sequences
    assert len(row.tokens) == 64
    body = text(row).removeprefix("<bos><start_of_turn>user\n").split(END)[0]
    assert question.endswith(body)
    assert text(row, row.is_answer) == f"a{END}"


def test_both_too_long_share_the_room():
    ((row,),) = encoded(Conversation(talk("1" * 200, "2" * 200)), on_long="truncate").sequences
    assert len(row.tokens) == 64
    assert row.n_prompt == 32
    assert text(row, row.is_answer) == "2" * 32


def test_cut_pairs_share_their_prompt():
    pair = Preference(talk("1" * 200), "2" * 20, "3" * 200)
    ((chosen, rejected),) = encoded(pair, form="preference", on_long="truncate").sequences
    np.testing.assert_array_equal(chosen.tokens[: chosen.n_prompt], rejected.tokens[: rejected.n_prompt])
    assert text(chosen, chosen.is_answer) == "2" * 20 + END
    assert text(rejected, rejected.is_answer) == "3" * 32


def test_a_cut_prompt_keeps_its_end():
    asked = encoded(Question(talk("0123456789" * 20)), form="prompt", on_long="truncate")
    ((row,),) = asked.sequences
    assert len(row.tokens) == 64
    assert text(row).endswith("3456789<end_of_turn>\n<start_of_turn>model\n")
    assert text(row).startswith("<bos><start_of_turn>user\n")


def test_the_fingerprint_changes_with_every_array():
    base = encoded(TWO, Conversation(talk("q", "a")))
    others = [
        encoded(Conversation(talk("q", "a")), TWO),
        encoded(TWO, Conversation(talk("q", "b"))),
        encoded(TWO, Conversation(talk("q", "a")), loss_on="last"),
        encoded(TWO, Conversation(talk("q", "a")), packing=True),
    ]
    assert base.fingerprint == encoded(TWO, Conversation(talk("q", "a"))).fingerprint
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_packing_by_hand():
    assert pack([5, 3, 8, 2, 2], 10) == [(0, 1, 4), (2, 3)]
    assert pack([10, 10], 10) == [(0,), (1,)]
    assert pack([], 10) == []


def test_packing_loses_nothing_and_fits():
    lengths = np.random.default_rng(0).integers(1, 100, 500).tolist()
    rows = pack(lengths, 128)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 128
    assert len(rows) <= 1.03 * sum(lengths) / 128
    assert rows == pack(lengths, 128)
