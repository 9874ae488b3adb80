"""Field maps and hh-rlhf's text: what a row becomes, and why it is refused."""

import pytest

from rlhf.data.examples import Conversation, Judged, Preference, Question, check
from rlhf.data.rows import Conversations, Judgements, Preferences, Questions
from rlhf.data.transcripts import parse_transcript
from rlhf.errors import ConfigError, DataError
from rlhf.model.chat import Message


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


U, A = Message("user", "q"), Message("assistant", "a")


def read(row_format, fields):
    example = row_format(fields)
    check(example)
    return example


def test_messages():
    fields = {"messages": [{"role": "system", "content": "s"}, user("q"), assistant("a")]}
    assert read(Conversations(), fields) == Conversation((Message("system", "s"), U, A))


def test_other_columns_keys_and_role_names():
    fields = {"talk": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert read(Conversations(messages="talk", role="from", content="value"), fields) == Conversation((U, A))


def test_text_parts_are_joined_and_an_empty_system_message_says_nothing():
    parts = [{"type": "text", "text": " q1 "}, {"type": "text", "text": "q2"}]
    fields = {"messages": [{"role": "system", "content": " "}, user(parts), assistant("a")]}
    assert read(Conversations(), fields) == Conversation((Message("user", "q1q2"), A))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"mesages": []}, r"there is no column 'messages' \(there are: mesages\); did you mean 'mesages'\?"),
        ({}, r"there is no column 'messages' \(there are: none\)"),
        ({"messages": None}, "column 'messages' is null"),
        ({"messages": "text"}, "column 'messages' must be a list of messages, not 'text'"),
        ({"messages": []}, "column 'messages' is an empty list"),
        ({"messages": ["q"]}, "message 1 of column 'messages' must be an object with 'role' and 'content', not 'q'"),
        ({"messages": [{"role": "user"}]}, r"message 1 of column 'messages' has no 'content' \(it has: role\)"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "has the role 'tool'; known are system, user, human"),
        ({"messages": [user(3)]}, "the content of message 1 of column 'messages' must be text, not 3"),
        ({"messages": [user(None)]}, "the content of message 1 of column 'messages' must be text, not None"),
        ({"messages": [user([{"type": "audio"}])]}, "has a part of type 'audio'; known are text and image"),
        ({"messages": [user("q"), assistant([{"type": "image"}])]}, "is of the assistant and has an image"),
        ({"messages": [{"role": "system", "content": ""}]}, "holds nothing but an empty system message"),
        ({"messages": [user("q")]}, "the last turn is the user's: there is no answer to learn"),
        ({"messages": [user("q"), assistant(" \n")]}, r"the turn 2 \(assistant\) is empty"),
        ({"messages": [user(" "), assistant("a")]}, r"the turn 1 \(user\) is empty"),
        ({"messages": [assistant("a")]}, "turn 1 is 'assistant', not 'user'"),
        ({"messages": [user("q"), user("q"), assistant("a")]}, "turn 2 is 'user', not 'assistant'"),
        ({"messages": [user("q\udc00"), assistant("a")]}, r"turn 1 \(user\): character 2 of the text is U\+DC00"),
    ],
)
def test_bad_conversations(fields, reason):
    with pytest.raises(DataError, match=reason):
        read(Conversations(), fields)


def test_preference_of_message_lists():
    fields = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    assert read(Preferences(), fields) == Preference((U,), "a", "b")


def test_preference_of_transcripts():
    fields = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant:  b\n\n"}
    assert read(Preferences(), fields) == Preference((U,), "a", "b")


@pytest.mark.parametrize("prompt", ["q", [user("q")], "\n\nHuman: q", "\n\nHuman: q\n\nAssistant:"])
@pytest.mark.parametrize("whole", [False, True])
def test_preference_with_a_prompt_column(prompt, whole):
    answers = [[user("q"), assistant(x)] if whole else [assistant(x)] for x in "ab"]
    for chosen, rejected in (answers, ("a", "b")):
        fields = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        assert read(Preferences(prompt="prompt"), fields) == Preference((U,), "a", "b")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]},
            "'chosen' and 'rejected' differ before the last answer, at turn 1: there is no shared prompt",
        ),
        (
            {"chosen": [user("q"), assistant("a"), user("r"), assistant("c")], "rejected": [user("q"), assistant("b")]},
            "differ before the last answer, at turn 2",
        ),
        (
            {"chosen": "a", "rejected": "b"},
            r"is text without '\\n\\nHuman:' turns, and no column is named as the prompt",
        ),
        ({"chosen": [user("q"), assistant("a")]}, "there is no column 'rejected'"),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("q")]}, "column 'rejected' ends with a user turn"),
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a ")]},
            "the chosen and the rejected answer are equal",
        ),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant:"},
            "column 'rejected': the answer is empty",
        ),
        (
            {"chosen": "\n\nHuman: q\n\nHuman: r\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: a"},
            "column 'chosen': roles must alternate user, assistant, ...: turn 2 is 'user', not 'assistant'",
        ),
        ({"chosen": [user("q"), assistant("")], "rejected": [user("q"), assistant("b")]}, "the chosen answer is empty"),
    ],
)
def test_bad_preferences(fields, reason):
    with pytest.raises(DataError, match=reason):
        read(Preferences(), fields)


def test_a_dialogue_must_hold_its_prompt():
    fields = {"prompt": "p", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    with pytest.raises(DataError, match="the dialogue in column 'chosen' does not hold the prompt in column 'prompt'"):
        read(Preferences(prompt="prompt"), fields)


def test_judgements():
    fields = {"prompt": "q", "completion": [assistant("a")], "label": 1}
    assert read(Judgements(), fields) == Judged((U,), "a", True)
    assert read(Judgements(), {"prompt": [user("q")], "completion": "a", "label": False}) == Judged((U,), "a", False)
    with pytest.raises(DataError, match="column 'label' must be true or false, not 'good'"):
        read(Judgements(), {"prompt": "q", "completion": "a", "label": "good"})
    with pytest.raises(DataError, match="column 'completion' must hold one assistant message, not 2 messages"):
        read(Judgements(), {"prompt": "q", "completion": [user("q"), assistant("a")], "label": True})


def test_questions():
    fields = {"question": "q", "answer": "1+2=3\n#### 3\n#### 4 "}
    whole = Questions(answer="answer")
    assert read(whole, fields) == Question((U,), fields["answer"], "1+2=3\n#### 3\n#### 4")
    last = Questions(answer="answer", answer_pattern=r"####\s*(\S+)")
    assert read(last, fields).reference == "4"
    assert read(Questions(answer="answer", answer_pattern=r"\d\+\d"), fields).reference == "1+2"
    assert read(Questions(), fields) == Question((U,))
    assert read(Questions(answer="n"), {"question": "q", "n": 7}).reference == "7"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"question": "q", "answer": "seven"}, r"column 'answer' has nothing that matches answer_pattern '####"),
        ({"question": "q", "answer": float("nan")}, "column 'answer' is nan, no number to compare with"),
        ({"question": "q", "answer": 10**400}, r"column 'answer' is 1000+\.\.\., no number to compare with"),
        ({"question": "q", "answer": True}, "column 'answer' must be text, not True"),
        ({"question": "", "answer": "#### 1"}, r"the turn 1 \(user\) is empty"),
        ({"question": "q"}, "there is no column 'answer'"),
    ],
)
def test_bad_questions(fields, reason):
    with pytest.raises(DataError, match=reason):
        read(Questions(answer="answer", answer_pattern=r"####\s*(\S+)"), fields)


def test_a_bad_pattern_is_named():
    with pytest.raises(ConfigError, match=r"dataset.rows.answer_pattern='\(' is no regular expression: missing \)"):
        Questions(answer="answer", answer_pattern="(")


def test_transcripts():
    text = "\n\nHuman: one\n\nstill: one\n\nAssistant: two Human: still\n\nHuman: three\n\nAssistant:\nfour"
    assert parse_transcript(text) == (
        Message("user", "one\n\nstill: one"),
        Message("assistant", "two Human: still"),
        Message("user", "three"),
        Message("assistant", "four"),
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Hello\n\nHuman: q\n\nAssistant: a", "there is text in front of the first turn: 'Hello'"),
        ("\n\nAssistant: a", "turn 1 is 'assistant', not 'user'"),
        ("\n\nHuman:\n\nAssistant: a", r"turn 1 \(user\) is empty"),
        ("\n\nHuman: q\n\nAssistant: ", "the answer is empty"),
        ("nothing", "there is text in front of the first turn: 'nothing'"),
    ],
)
def test_bad_transcripts(text, reason):
    with pytest.raises(DataError, match=reason):
        parse_transcript(text)
