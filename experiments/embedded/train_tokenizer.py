"""Train the tokenizer that ships with the package: python experiments/embedded/train_tokenizer.py

Writes rlhf/model/embedded/tokenizer.model, or the file given as argument; the same bytes each time. It is a
SentencePiece model made as Gemma 3's is: byte fallback, digits split, white space kept, no normalisation, no dummy
prefix, and the special pieces at Gemma's ids up to the html tags. The image pieces, at 255999 and 256000 there, follow
after those.
"""

import io
import sys
from pathlib import Path

import sentencepiece

from rlhf.data.arithmetic import conversations, preferences, problems
from rlhf.model.tokenizer import EMBEDDED

N_VOCAB = 1024
_TAGS = "table caption thead tbody tfoot tr th td"
_TAGS_WITH_HEADINGS = "h1 h2 h3 h4 h5 h6 blockquote"
_INLINE_TAGS = "strong em b i u s sub sup code"

# Frequent words of English, so that text about anything else is not spelt in letters
_WORDS = """
the of and to a in is it you that he was for on are with as his they be at one have this from or had by not but what
all were when we there can an your which their said if do will each about how up out them then she many some so
these would other into has more her two like him see time could no make than first been its who now people my made
over did down only way find use may water long little very after words called just where most know get through back
much before go good new write our used me man too any day same right look think also around another came come work
three word must because does part even place well such here take why things help put years different away again off
went old number great tell men say small every found still between name should home big give air line set own under
read last never us left end along while might next sound below saw something thought both few those always looked
show large often together asked house world going want school important until form food keep children feet land side
without boy once animals life enough took sometimes four head above kind began almost live page got earth need far
hand high year mother light parts country father let night following picture being study second eyes soon times
story boys since white days ever paper hard near sentence better best across during today others however sure means
knew try told young miles sun ways thing whole hear example heard several change answer room sea against top turned
learn point city play toward five using himself usually please question could provide information system user model
human assistant sorry language code function list data text problem reason because therefore result total each cost
money dollars hours minutes week month percent half twice equal sum ing ion ed er es ly tion ment ness able ful est
ive al ous ers ings ity ence ance
"""


def special_pieces() -> list[str]:
    """Everything between UNK and the bytes, in order of id."""
    pieces = ["<mask>", "[multimodal]", *(f"<unused{number}>" for number in range(99))]
    pieces += ["<start_of_turn>", "<end_of_turn>"]
    pieces += ["\n" * length for length in range(1, 32)]
    pieces += ["▁" * length for length in range(2, 32)]
    for tags in (_TAGS, _TAGS_WITH_HEADINGS, _INLINE_TAGS):
        pieces += [f"<{tag}>" for tag in tags.split()] + [f"</{tag}>" for tag in tags.split()]
    return [*pieces, "<start_of_image>", "<end_of_image>"]


def corpus() -> list[str]:
    """The embedded rows of the training split, and words of English."""
    texts = [text for row in problems("train", 4000) for text in (row["question"], row["answer"])]
    texts += [turn["content"] for row in conversations("train", 4000) for turn in row["messages"]]
    texts += [row["rejected"][-1]["content"] for row in preferences("train", 4000)]
    texts += ["user", "model"] * 4000
    words = _WORDS.split()
    texts += [" ".join(words[start:] + words[:start]) for start in range(0, len(words), 10)]
    return texts


def train() -> bytes:
    """The model file."""
    model = io.BytesIO()
    ascii_characters = "".join(map(chr, range(33, 127)))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=N_VOCAB,
        user_defined_symbols=special_pieces(),
        required_chars=ascii_characters,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        max_sentence_length=1 << 16,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else EMBEDDED
    target.write_bytes(train())
    print(f"{target}: {target.stat().st_size} bytes")
