"""Text without control pieces is encoded exactly as SentencePiece encodes it, on two tokenizers with Gemma's ids."""

import io
import random
import runpy
from pathlib import Path

import pytest
import sentencepiece

from rlhf.model.tokenizer import EMBEDDED, Tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "embedded" / "train_tokenizer.py"
ODD = [
    "a",
    "Zebra",
    "the",
    " ",
    "  ",
    "       ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "é",
    "ß",
    "日本",
    "😀",
    "\u2028",
    "\u200b",
]
ODD += [
    "\ufeff",
    "\0",
    "<",
    ">",
    "</b>",
    "<table>",
    "1234",
    "![x](y)",
    "\ufffd",
    "﷽",
    "[",
    "]",
    "<unused",
    "end_of_turn>",
]


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """One of another vocabulary, trained on this directory's tests."""
    path = tmp_path_factory.mktemp("other") / "tokenizer.model"
    written = io.BytesIO()
    texts = [line for file in sorted(Path(__file__).parent.glob("*.py")) for line in file.read_text().splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=written, model_type="bpe", vocab_size=1300, byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        user_defined_symbols=runpy.run_path(str(SCRIPT))["special_pieces"](), character_coverage=1.0,
        minloglevel=2,
    )  # fmt: skip
    path.write_bytes(written.getvalue())
    return path


@pytest.mark.parametrize("which", ["embedded", "other"])
def test_thousands_of_odd_texts(other, which):
    path = EMBEDDED if which == "embedded" else other
    tokenizer, raw = Tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert (tokenizer.pad, tokenizer.eos, tokenizer.bos, tokenizer.start_of_turn) == (0, 1, 2, 105)
    rng, n_compared = random.Random(3), 0
    for _ in range(3000):
        text = "".join(rng.choices(ODD, k=rng.randrange(1, 20)))
        expected = raw.encode(text)
        if not any(map(tokenizer.is_control, expected)):
            assert tokenizer.encode(text) == expected, text
            n_compared += 1
    assert n_compared > 2900
