"""What is exported, in the hands of the libraries it is for: `make test-peers` installs them and runs this.

One process of theirs does all the work; the tests compare what it left.
"""

import json
import random
import subprocess
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_models import load_reference
from reference_vision import load_torch_form

from rlhf.model.chat import ChatTemplate, Message, Placed
from rlhf.model.checkpoints import write_hf, write_peft
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.lora import LoRA, draw_adapter
from rlhf.model.tokenizer import Tokenizer
from rlhf.model.vision import Vision

PYTHON = Path(__file__).resolve().parents[2] / ".venv-peers" / "bin" / "python"
ODD = [
    "a",
    "Ann",
    " ",
    "  ",
    "      ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t",
    "\r\n",
    "é",
    "日本",
    "😀",
    "\u2028",
    "\u200b",
    "<",
    "user",
]
ODD += [
    "model",
    "42",
    "<b>",
    "</table>",
    "```",
    "end of_turn>",
    "|",
    "#### 5",
    "\ufeff",
    "the",
    "of people",
    "<h1>",
    "﷽",
]
LORA = LoRA(rank=3, alpha=5.0, targets=("q", "v", "down"), rank_stabilised=True)
SEES = Architecture(
    vocab_size=1024, width=32, ff_width=48, layers=6, heads=2, kv_heads=1, head_width=16, query_scale=0.25, window=8,
    vision=Vision(image_size=32, patch=4, width=16, ff_width=24, layers=2, heads=2, tokens_per_image=4),
)  # fmt: skip
logits = jax.jit(Gemma3.logits, static_argnums=0)


class Case(NamedTuple):
    a: Architecture
    params: dict
    expected: dict


@pytest.fixture(scope="module")
def cases(shared):
    fixtures = shared / "fixtures"
    text = Case(*load_reference(fixtures / "gemma3_tiny_text_rope8"))
    return {"text": text, "images": Case(*load_torch_form(fixtures / "gemma3_tiny_mm"))}


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    found = ["".join(rng.choices(ODD, k=rng.randrange(1, 12))) for _ in range(2000)]
    chats = []
    for number in range(300):
        roles = ("system", "user", "assistant", "user", "assistant")[number % 2 : rng.choice((2, 3, 5))]
        chats.append([{"role": role, "content": "".join(rng.choices(ODD, k=6))} for role in roles])
    return {"texts": found, "chats": chats}


@pytest.fixture(scope="module")
def adapter(cases):
    drawn = draw_adapter(jax.random.key(0), cases["text"].a, LORA)
    return jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), drawn)


@pytest.fixture(scope="module")
def theirs(cases, texts, adapter, tmp_path_factory):
    """The folder with everything that the other process wrote."""
    if not PYTHON.is_file():
        pytest.skip("torch, transformers and peft are not installed beside this project: make test-peers")
    out = tmp_path_factory.mktemp("peers")
    for name, (a, params, expected) in cases.items():
        (out / name).mkdir()
        write_hf.write(params, a, "float32", Tokenizer(), out / name, 50_000)
        given = {
            key: expected[key]
            for key in ("input_ids", "attention_mask", "pixel_values", "token_type_ids")
            if key in expected
        }
        np.savez(out / f"{name}_in.npz", **given)
    config = json.loads((out / "images" / "config.json").read_text())
    # the fixture's own id for image tokens, where the export names the first that the tokenizer has not
    (out / "images" / "config.json").write_text(json.dumps(config | {"image_token_index": 282}))
    (out / "adapter").mkdir()
    write_peft.write(adapter, LORA, None, out / "adapter")
    (out / "texts.json").write_text(json.dumps(texts))
    (out / "sees").mkdir()
    write_hf.write(components(), SEES, "float32", Tokenizer(), out / "sees", 10**9)
    np.savez(out / "picture.npz", picture=picture())
    jobs = [
        ["text", "text", "text_in.npz", "text_out.npz"],
        ["text", "text", "text_in.npz", "adapter_out.npz", "adapter"],
        ["images", "images", "images_in.npz", "images_out.npz"],
        ["tokens", "text", "texts.json", "texts_out.json"],
        ["processor", "sees", "picture.npz", "processor_out.npz"],
    ]
    (out / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("peer.py")
    done = subprocess.run([PYTHON, script, "jobs.json"], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def components() -> dict:
    model = Gemma3(SEES)
    return jax.tree.map(lambda x: jnp.zeros(x.shape), model.abstract_components())


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)


def compare(case: Case, found: np.ndarray, params: dict) -> None:
    """Their logits of the exported files, and ours of the parameters that were exported."""
    real = case.expected["attention_mask"].astype(bool)
    positions = jnp.asarray(np.maximum(np.cumsum(real, axis=1) - 1, 0))
    ours = logits(
        Gemma3(case.a), params, jnp.asarray(case.expected["input_ids"]), jnp.asarray(real, jnp.int32), positions
    )
    np.testing.assert_allclose(found[real][:, : case.a.vocab_size], np.asarray(ours)[real], atol=1e-4)


def test_text(cases, theirs):
    found = np.load(theirs / "text_out.npz")["logits"]
    real = cases["text"].expected["attention_mask"].astype(bool)
    np.testing.assert_allclose(found[real], cases["text"].expected["logits"][real], atol=1e-5)
    compare(cases["text"], found, cases["text"].params)


def test_images(cases, theirs):
    a, _, expected = cases["images"]
    found, real = np.load(theirs / "images_out.npz")["logits"], expected["attention_mask"].astype(bool)
    assert found.shape[-1] == a.vocab_size + 64
    np.testing.assert_allclose(found[real][:, : a.vocab_size], expected["logits"][real], atol=1e-5)


def test_an_adapter(cases, adapter, theirs):
    case = cases["text"]
    params = {**case.params, "adapter": adapter, "adapter_scale": jnp.float32(LORA.scale)}
    found = np.load(theirs / "adapter_out.npz")["logits"]
    assert np.abs(found - np.load(theirs / "text_out.npz")["logits"]).max() > 0.1
    compare(case, found, params)


def test_tokens(texts, theirs):
    """White space, tags, bytes and digits of thousands of odd texts; the template of a few hundred conversations."""
    tokenizer = Tokenizer()
    found = json.loads((theirs / "texts_out.json").read_text())
    assert found["ids"] == tokenizer.encode_many(texts["texts"])
    assert found["decoded"] == texts["texts"]
    template = ChatTemplate(tokenizer)
    for chat, ids in zip(texts["chats"], found["chats"], strict=True):
        messages = [Message(**turn) for turn in chat]
        is_open = messages[-1].role == "user"
        assert ids == (template.prompt(messages) if is_open else template.conversation(messages).tokens), chat


def test_the_processor(theirs):
    """A picture in a text becomes the tokens that it is here, and the same pixels."""
    made, tokenizer = np.load(theirs / "processor_out.npz"), Tokenizer()
    message = Message("user", "Look:What is it?", images=(Placed(5, None),))
    ours = ChatTemplate(tokenizer, SEES.vision.tokens_per_image).prompt([message])
    assert [0 if index == tokenizer.n_vocab else index for index in made["input_ids"][0].tolist()] == ours
    assert ours.count(0) == SEES.vision.tokens_per_image
    np.testing.assert_allclose(made["pixel_values"][0].transpose(1, 2, 0), picture() / 127.5 - 1, atol=1e-6)
