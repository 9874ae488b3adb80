"""Answers through the real command: prompts with pictures, evaluation on them, a conversation through a pipe."""

import io
import json
import sys

import pytest
from PIL import Image

from rlhf.errors import ConfigError, DataError
from rlhf.sampling.methods import Beam
from rlhf.tasks.chat import Chat
from rlhf.tasks.generate import Generate

SEEING = (
    "model=tiny_vision", "model.width=32", "model.ff_width=48", "model.heads=2", "model.kv_heads=1", "model.layers=2",
    "model.pattern=2", "model.head_width=16", "model.vision.width=16", "model.vision.ff_width=24", "dataset=colours",
    "model.vision.heads=2", "dataset.n_train=8", "dataset.n_eval=4", "evaluation.rows=4", "evaluation.max_new_tokens=8",
)  # fmt: skip
READING = tuple(word for word in SEEING if "vision" not in word and "dataset" not in word)


@pytest.fixture
def pictures(tmp_path):
    for colour in ("red", "blue"):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{colour}.png")
    return tmp_path


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_prompts_with_pictures(command, pictures):
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image", "path": "blue.png"}]
    asked = [
        {"prompt": "Which colour?", "image": "red.png"},
        {"prompt": [{"role": "user", "content": parts}]},
        {"prompt": "No picture."},
    ]
    (pictures / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    done = command("task=generate", *SEEING, "prompts=asked.jsonl", "hydra.run.dir=out")
    assert done.code == 0, done.output
    answered = rows(pictures / "out" / "generations.jsonl")
    assert [message["content"] for row in answered for message in row["prompt"]] == [
        "Which colour?", "What is this?", "No picture.",
    ]  # fmt: skip
    assert [[m.get("images") for m in row["prompt"]] for row in answered] == [
        [["image red.png"]], [["image blue.png"]], [None],
    ]  # fmt: skip
    (pictures / "asked.jsonl").write_text(json.dumps(asked[0]) + "\n\n" + '{"question": "?"}\n')
    blind = command("task=generate", *READING, "prompts=asked.jsonl", "hydra.run.dir=blind")
    assert blind.code == 1
    assert "asked.jsonl:1: the row has an image and model.vision is null" in blind.output


def test_questions_of_a_text_file(tmp_path):
    path = tmp_path / "asked.txt"
    path.write_bytes("\ufeffFirst\u2028still first\x0b\r\n \r\nLast".encode())
    asked = [[turn.content for turn in turns] for turns in Generate(prompts=str(path))._conversations(None)]
    assert asked == [["First\u2028still first\x0b"], ["Last"]]
    path.write_bytes(b"First\n\nSec\xffond\n")
    with pytest.raises(DataError, match=r"asked.txt:3: byte 4 of the line is no UTF-8"):
        Generate(prompts=str(path))._conversations(None)


def test_several_answers_need_a_method_that_draws(command):
    done = command("task=generate", *READING, "prompts=[Why?]", "task.n=3")
    assert done.code == 1
    assert "task.n=3 needs a method that draws, such as evaluation.method=standard" in done.output


def test_pictures_are_evaluated_on(command, tmp_path):
    done = command("task=evaluate", *SEEING, "hydra.run.dir=out")
    assert done.code == 0, done.output
    assert len(rows(tmp_path / "out" / "rows.jsonl")) == 4


def test_a_conversation_through_a_pipe(command, pictures, monkeypatch):
    lines = "Hello there\n/image red.png\nWhat is this?\n\n/image none.png\n/what\n/reset\nHello there\n/quit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    settings = ("task.max_new_tokens=8", "task.room=128", "task.method=greedy")
    done = command("task=chat", *SEEING, *settings, "task.system=Be brief.", "hydra.run.dir=out")
    assert done.code == 0, done.output
    first, second, again = rows(pictures / "out" / "chat.jsonl")
    assert (first["user"], second["user"], first["images"], second["images"]) == (
        "Hello there", "What is this?", [], ["red.png"],
    )  # fmt: skip
    assert second["n_run"] > first["n_run"]  # a picture's turn runs the whole
    assert again == first  # forgotten: the same words begin the same conversation
    shown = done.output
    assert f"> Hello there\n{first['answer']}" in shown
    assert "(image of 40 × 30 pixels, shown with your next turn)" in shown
    assert "error: image none.png: there is no such file" in shown
    assert "error: there is no /what" in shown
    assert "never" not in shown.partition("(begun again)")[2]


def test_beam_search_is_no_way_to_chat():
    with pytest.raises(ConfigError, match="Beam knows an answer only at its end: chat with Greedy or Sample"):
        Chat(method=Beam())
