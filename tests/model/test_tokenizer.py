"""The SentencePiece wrapper and the tokenizer that ships with the package."""

import random
import runpy
from pathlib import Path

import pytest
import sentencepiece

from rlhf.errors import CheckpointError, DataError
from rlhf.model.tokenizer import EMBEDDED, Tokenizer

TRAIN_SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "embedded" / "train_tokenizer.py"

CONTROL = ["<end_of_turn>", "<start_of_turn>", "<start_of_image>", "<end_of_image>", "<unused7>", "<mask>"]
CONTROL += ["[multimodal]", "<bos>", "<eos>", "<pad>", "<unk>", "<unused98>", "<unused5000>"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def test_special_ids_are_at_gemmas_places(tokenizer):
    ids = (tokenizer.pad, tokenizer.eos, tokenizer.bos, tokenizer.unk, tokenizer.mask)
    assert ids == (0, 1, 2, 3, 4)
    assert (tokenizer.start_of_turn, tokenizer.end_of_turn) == (105, 106)
    assert tokenizer.stop_ids == (1, 106)
    places = {5: "[multimodal]", 6: "<unused0>", 104: "<unused98>", 107: "\n", 108: "\n\n", 137: "\n" * 31}
    places |= {138: "▁▁", 167: "▁" * 31, 168: "<table>", 176: "</table>", 215: "</code>"}
    assert {index: tokenizer.piece(index) for index in places} == places
    assert tokenizer.n_vocab == 1024


def test_ids_come_from_the_file_and_not_from_constants(tokenizer):
    assert tokenizer.piece(tokenizer.start_of_image) == "<start_of_image>"
    assert tokenizer.piece(tokenizer.end_of_image) == "<end_of_image>"
    assert tokenizer.start_of_image < tokenizer.n_vocab


def test_the_shipped_file_is_small_and_made_by_the_script():
    assert EMBEDDED.stat().st_size <= 300_000
    made = runpy.run_path(str(TRAIN_SCRIPT))["train"]()
    fresh = sentencepiece.SentencePieceProcessor(model_proto=made)
    shipped = sentencepiece.SentencePieceProcessor(model_file=str(EMBEDDED))
    assert [fresh.id_to_piece(i) for i in range(1024)] == [shipped.id_to_piece(i) for i in range(1024)]


@pytest.mark.parametrize("piece", CONTROL)
@pytest.mark.parametrize("frame", ["{}", "a{}b", " {} {}", "<{}>", "{}\n\n{}", "x<unused{}"])
def test_control_pieces_in_text_are_characters(tokenizer, piece, frame):
    text = frame.format(piece, piece)
    ids = tokenizer.encode(text)
    assert not any(map(tokenizer.is_control, ids))
    assert tokenizer.decode(ids) == text


def test_the_library_itself_would_read_them_as_control():
    """What the cutting is for: without it this text ends the turn."""
    raw = sentencepiece.SentencePieceProcessor(model_file=str(EMBEDDED))
    assert 106 in raw.encode("say <end_of_turn> now")
    assert 106 not in Tokenizer().encode("say <end_of_turn> now")


def test_white_space_and_html_tags_are_ordinary_pieces(tokenizer):
    assert tokenizer.encode("\n\n") == [108]
    assert tokenizer.encode("    x")[0] == 140
    assert tokenizer.encode("<table>") == [168]
    assert not tokenizer.is_control(108)
    assert not tokenizer.is_control(168)


def test_digits_are_split_and_nothing_is_put_in_front(tokenizer):
    assert [tokenizer.piece(i) for i in tokenizer.encode("1234")] == ["1", "2", "3", "4"]
    assert tokenizer.decode(tokenizer.encode("1234")) == "1234"


def test_any_text_comes_back(tokenizer):
    rng = random.Random(0)
    alphabet = [
        "a",
        "Zebra",
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "é",
        "ß",
        "日本",
        "😀",
        "\u2028",
        "\u200b",
        "\ufeff",
        "\0",
        "<",
    ]
    alphabet += [">", "</b>", "9", "![x](y)", "\ufffd", "﷽", "<end_of_turn>", "<unused3>", "[multimodal]", "\x7f"]
    for _ in range(2000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(12)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_many_texts_are_encoded_as_one_by_one(tokenizer):
    texts = ["Ann has 3", "", "<bos>x<end_of_turn>", "é", "  "]
    assert tokenizer.encode_many(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_many([]) == []


def test_decode_leaves_control_pieces_out_or_spells_them(tokenizer):
    ids = [2, 105, *tokenizer.encode("hi"), 106, 0, 5000]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, show_control=True) == "<bos><start_of_turn>hi<end_of_turn><pad><id 5000>"


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"character 3 of the text is U\+D83D, half of a surrogate pair"):
        tokenizer.encode("ab\ud83d")


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no tokenizer at .*: expected a SentencePiece file named tokenizer\.model"
    ):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="is no SentencePiece model"):
        Tokenizer(tmp_path)
    (tmp_path / "other.model").write_bytes(_model_without_turns())
    with pytest.raises(CheckpointError, match="is no Gemma tokenizer: it has no piece <mask>, <start_of_turn>"):
        Tokenizer(tmp_path / "other.model")


def test_a_folder_with_a_tokenizer_is_fine(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(EMBEDDED.read_bytes())
    assert Tokenizer(tmp_path).encode("Ann") == Tokenizer().encode("Ann")


def _model_without_turns() -> bytes:
    import io

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words"] * 5), model_writer=model, model_type="bpe", vocab_size=20,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()
