"""Images in rows: every form they are given in, where they go, and what is wrong with them, by file and line."""

import base64
import json

import numpy as np
import pytest
from PIL import Image

from rlhf.data.batches import collate
from rlhf.data.dataset import Table
from rlhf.data.describe import describe_batch
from rlhf.data.images import PanAndScan
from rlhf.data.pictures import pictures_of
from rlhf.data.rows import Conversations, Judgements, Preferences, Questions
from rlhf.errors import ConfigError, DataError
from rlhf.model.tokenizer import Tokenizer
from rlhf.model.vision import Vision

TOKENIZER = Tokenizer()
VISION = Vision(image_size=8, patch=2, width=8, ff_width=8, layers=1, heads=1, tokens_per_image=4)
RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)
SOFT = [TOKENIZER.pad] * 4
FRAME = [*TOKENIZER.encode("\n\n"), TOKENIZER.start_of_image, *SOFT, TOKENIZER.end_of_image, *TOKENIZER.encode("\n\n")]


@pytest.fixture
def folder(tmp_path):
    for name, colour in {"red": RED, "green": GREEN, "blue": BLUE}.items():
        Image.new("RGB", (12, 12), colour).save(tmp_path / f"{name}.png")
    Image.new("RGB", (900, 300), RED).save(tmp_path / "long.png")
    return tmp_path


def table(folder, *rows, shape=None, **settings) -> Table:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Table(rows=shape or Conversations(), path=str(path), **{"max_length": 256, **settings})


def talk(*parts, answer="fine", **columns) -> dict:
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}], **columns}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def image(**named) -> dict:
    return {"type": "image", **named}


def load(data: Table, form="conversation"):
    return data.load("train", form, TOKENIZER, VISION)


def shown(examples, row: int) -> list[tuple]:
    """The colour of each filled slot of a row of a batch."""
    batch = collate(examples, [row])
    return [tuple(slot[0, 0].tolist()) for slot in batch["images"][0, : len(examples.pictures[row])]]


def test_the_token_sequence_of_an_image_by_hand(folder):
    examples = load(table(folder, talk(text("a"), image(path="red.png"), text("b"))))
    (row,) = examples.sequences[0]
    t, encode = TOKENIZER, TOKENIZER.encode
    head = [t.bos, t.start_of_turn, *encode("user\na")]
    answer = [t.start_of_turn, *encode("model\n"), *encode("fine"), t.end_of_turn, *encode("\n")]
    assert row.tokens.tolist() == [*head, *FRAME, *encode("b"), t.end_of_turn, *encode("\n"), *answer]
    first = len(head) + FRAME.index(t.start_of_image) + 1
    expected = np.zeros(len(row.tokens), int)
    expected[first : first + 4] = [1, 2, 3, 4]
    assert row.soft_tokens.tolist() == expected.tolist()
    assert shown(examples, 0) == [RED]


def data_url(path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def test_every_form_of_a_part(folder):
    encoded = base64.b64encode((folder / "red.png").read_bytes()).decode()
    forms = [
        image(path="red.png"),
        image(image="red.png"),
        image(image={"path": "red.png", "bytes": None}),
        image(base64=encoded),
        image(url=data_url(folder / "red.png")),
        image(path=str(folder / "red.png")),
        {"type": "image_url", "image_url": {"url": data_url(folder / "red.png")}},
        image(path="red.png", base64=None),  # as Arrow fills up what other rows have
    ]
    examples = load(table(folder, *(talk(form, text("what?")) for form in forms)))
    assert [shown(examples, row) for row in range(len(forms))] == [[RED]] * len(forms)


def test_images_in_a_column_go_in_front_or_into_their_places(folder):
    rows = [
        {"messages": talk("x")["messages"], "image": "red.png"},
        {"messages": talk("x")["messages"], "images": ["red.png", "blue.png"]},
        talk(image(), text("and"), image(), images=["green.png", "red.png"]),
        talk(image(path="blue.png"), text("x"), image="red.png"),  # brings its own
    ]
    rows[0]["messages"][0]["content"] = rows[1]["messages"][0]["content"] = "what <start_of_image>?"
    examples = load(table(folder, *rows))
    assert [shown(examples, row) for row in range(4)] == [[RED], [RED, BLUE], [GREEN, RED], [BLUE]]
    for row, n in ((0, 1), (1, 2), (2, 2)):
        tokens = examples.sequences[row][0].tokens.tolist()
        assert tokens.count(TOKENIZER.start_of_image) == n  # what a user writes stays text
    start = [TOKENIZER.bos, TOKENIZER.start_of_turn, *TOKENIZER.encode("user\n")]
    assert examples.sequences[1][0].tokens.tolist()[: len(start) + 2 * len(FRAME)] == [*start, *FRAME, *FRAME]
    assert "<start_of_image>?" in TOKENIZER.decode(examples.sequences[0][0].tokens.tolist())


def test_a_named_column_counts_and_a_system_prompt_stays_in_front(folder):
    data = table(folder, talk(text("q"), photo="red.png"), shape=Conversations(images="photo"), system_prompt="Look.")
    examples = load(data)
    tokens = examples.sequences[0][0].tokens.tolist()
    start = [TOKENIZER.bos, TOKENIZER.start_of_turn, *TOKENIZER.encode("user\nLook.\n\n")]
    assert tokens[: len(start) + len(FRAME)] == [*start, *FRAME]


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        (talk(image(path="gone.png")), {}, r"image .*gone.png: there is no such file"),
        (talk(image(path="rows.jsonl")), {}, r"image .*rows.jsonl is no picture of a kind that can be read"),
        (talk(image(url="https://a.b/c.png")), {}, r"'https://a.b/c.png' is on the network: save it"),
        (talk(image(url="data:image/png,abc")), {}, r"the data URL 'data:image/png,abc' is not in base64"),
        (talk(image(image="A" * 2000)), {}, r"base64 needs 'data:image/png;base64,' in front"),
        (talk(image(image=3)), {}, r"an image must be a path, a data URL, bytes .*, not a int"),
        (talk(image(path="red.png", url="x")), {}, r"an image part names path and url: one of them is enough"),
        (talk(image(), text("q")), {}, r"leave places for 1 images, and the row has 0"),
        (talk(image(), text("q"), images=["red.png", "red.png"]), {}, r"places for 1 images, and the row has 2"),
        (talk(text("q"), image="red.png", images=["red.png"]), {}, r"columns 'image' and 'images': name the one"),
        (talk(text("q"), images=["red.png"] * 3), {"max_images": 2}, r"has 3 images, more than dataset.max_images=2"),
        (
            talk(text("q")),
            {"shape": Conversations(images="photo")},
            r"there is no column 'photo' \(there are: messages",
        ),
    ],
)
def test_a_bad_image_is_named_with_file_line_and_rule(folder, row, settings, reason):
    good = talk(text("q"), **({"photo": "red.png"} if "shape" in settings else {}))
    with pytest.raises(DataError, match=rf"rows.jsonl:2: .*{reason}"):
        load(table(folder, good, row, **settings))
    examples = load(table(folder, good, row, on_bad_row="skip", **settings))
    assert len(examples) == 1


def test_a_cut_off_file_is_found_before_training(folder):
    whole = (folder / "long.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"rows.jsonl:1: image .*cut.png is damaged or cut off"):
        load(table(folder, talk(image(path="cut.png"))))


def test_a_model_without_a_tower_says_so_or_reads_the_text(folder):
    data = table(folder, talk(text("q"), image="red.png"))
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*model.vision is null: .* or dataset.max_images=0 to read"):
        data.load("train", "conversation", TOKENIZER)
    blind = table(folder, talk(text("q"), image="gone.png"), max_images=0).load("train", "conversation", TOKENIZER)
    plain = table(folder, talk(text("q"))).load("train", "conversation", TOKENIZER)
    assert blind.fingerprint == plain.fingerprint
    with pytest.raises(ConfigError, match="max_images=-1 of Table must be at least 0"):
        table(folder, max_images=-1)


def test_images_stay_on_the_disk_until_a_batch_needs_them(folder):
    Image.new("RGB", (12, 12), (1, 2, 3)).save(folder / "new.png")
    examples = load(table(folder, talk(image(path="new.png"), text("q"))))
    (folder / "new.png").rename(folder / "moved.png")
    with pytest.raises(DataError, match=r"rows.jsonl:1: image .*new.png: there is no such file"):
        collate(examples, [0])
    (folder / "moved.png").rename(folder / "new.png")
    assert shown(examples, 0) == [(1, 2, 3)]


def test_parquet_columns_are_read_cell_by_cell(folder):
    import datasets

    whole = {name: (folder / f"{name}.png").read_bytes() for name in ("red", "blue")}
    cells = [{"bytes": whole["red"], "path": None}, None, {"bytes": whole["blue"], "path": "b.png"}]
    columns = {"question": ["a", "b", "c"], "answer": ["1", "2", "3"]}
    features = {"question": datasets.Value("string"), "answer": datasets.Value("string")}
    one = datasets.Dataset.from_dict(
        {**columns, "image": cells}, features=datasets.Features({**features, "image": datasets.Image()})
    )
    several = datasets.Dataset.from_dict(
        {**columns, "images": [[cells[0], cells[2]], [], [cells[2]]]},
        features=datasets.Features({**features, "images": datasets.List(datasets.Image())}),
    )
    expected = {"one": [[RED], [], [BLUE]], "several": [[RED, BLUE], [], [BLUE]]}
    for name, made in {"one": one, "several": several}.items():
        made.to_parquet(str(folder / f"{name}.parquet"))
        data = Table(rows=Questions(answer="answer"), path=str(folder / f"{name}.parquet"), max_length=64)
        examples = load(data, "conversation")
        assert [shown(examples, row) if examples.pictures[row] else [] for row in range(3)] == expected[name]
        assert b"PNG" not in str(load(data, "prompt").prompts[0].fields).encode()  # the row holds no pixels


def test_truncation_goes_around_images(folder):
    words = text(" ".join(["word"] * 60))
    parts = [words, image(path="red.png"), words, image(path="blue.png"), text("end")]
    whole = load(table(folder, talk(*parts)))
    n_whole = len(whole.sequences[0][0].tokens)
    for max_length in (n_whole - 5, 100, 64):
        examples = load(table(folder, talk(*parts), on_long="truncate", max_length=max_length))
        (row,) = examples.sequences[0]
        assert examples.n_truncated == 1
        assert len(row.tokens) == max_length
        assert row.soft_tokens[row.soft_tokens > 0].tolist() == list(range(1, 9))
        for first in (1, 5):
            place = int(np.flatnonzero(row.soft_tokens == first)[0]) - FRAME.index(TOKENIZER.pad)
            assert row.tokens[place : place + len(FRAME)].tolist() == FRAME
        assert shown(examples, 0) == [RED, BLUE]
    with pytest.raises(DataError, match="leaves no room for the prompt"):
        load(table(folder, talk(*parts), on_long="truncate", max_length=24))
    old = [*talk(image(path="red.png"), words)["messages"], *talk(image(path="blue.png"), text("end"))["messages"]]
    examples = load(table(folder, {"messages": old}, on_long="truncate", max_length=64))
    assert shown(examples, 0) == [BLUE]  # the oldest exchange went, and its image with it


def test_soft_tokens_are_never_targets(folder):
    examples = load(table(folder, talk(text("q"), image="red.png"), loss_on="all"))
    (row,) = examples.sequences[0]
    marks = (TOKENIZER.start_of_image, TOKENIZER.end_of_image)
    is_image = (row.soft_tokens > 0) | np.isin(row.tokens, marks)
    assert row.is_answer.tolist() == (~is_image & (np.arange(len(is_image)) > 0)).tolist()


def test_pan_and_scan_adds_parts_and_the_published_words(folder):
    examples = load(table(folder, talk(image(path="long.png"), text("q")), pan_and_scan=PanAndScan()))
    (row,) = examples.sequences[0]
    assert [picture.box for picture in examples.pictures[0]] == [
        None, (0, 0, 300, 300), (300, 0, 600, 300), (600, 0, 900, 300),
    ]  # fmt: skip
    encode = TOKENIZER.encode
    middle = [*encode("user\nHere is the original image "), *FRAME]
    middle += [*encode(" and here are some crops to help you see better "), *FRAME, *encode(" "), *FRAME]
    assert row.tokens.tolist()[2 : 2 + len(middle)] == middle


def batch_of(folder, form, shape, *rows, **settings):
    examples = load(table(folder, *rows, shape=shape, **settings), form)
    return examples, collate(examples, range(len(examples.packs)))


def test_a_batch_has_images_where_a_row_has_one(folder):
    rows = [talk(text("q"), image=name) for name in ("red.png", None)]
    rows += [talk(text("q"), images=["red.png", "blue.png"])]
    examples, batch = batch_of(folder, "conversation", None, *rows)
    assert batch["images"].shape == (3, 2, 8, 8, 3)
    assert batch["images"].dtype == np.uint8
    assert batch["soft_tokens"].max(axis=1).tolist() == [4, 0, 8]
    alone = collate(examples, [1])
    assert not {"images", "soft_tokens"} & alone.keys()
    assert "images 3 × 2 of 8 × 8 pixels (batch × slots); 3 slots filled" in describe_batch(batch, TOKENIZER)
    assert "<image 2: 4 tokens>" in describe_batch(batch, TOKENIZER, 3)


def test_packed_rows_number_their_images_on(folder):
    rows = [talk(text("q"), image=name) for name in ("red.png", None, "blue.png")]
    examples, batch = batch_of(folder, "conversation", None, *rows, packing=True)
    assert examples.packs == [(0, 1, 2)]
    soft_tokens, segments = batch["soft_tokens"][0], batch["segments"][0]
    assert soft_tokens[soft_tokens > 0].tolist() == list(range(1, 9))
    assert [soft_tokens[segments == segment].max() for segment in (1, 2, 3)] == [4, 0, 8]
    assert [tuple(slot[0, 0]) for slot in batch["images"][0]] == [RED, BLUE]


def test_both_answers_share_the_images_of_their_prompt(folder):
    asked = talk(image(path="red.png"), text("q"))["messages"][:1]
    pair = {side: [*asked, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    row = {"prompt": asked, "chosen": "yes", "rejected": "no"}
    for shape, given in ((Preferences(), pair), (Preferences(prompt="prompt"), row)):
        examples, batch = batch_of(folder, "preference", shape, given)
        assert batch["images"].shape == (1, 1, 8, 8, 3)
        assert batch["soft_tokens"].shape == batch["tokens"].shape
        assert (batch["soft_tokens"][0, 0] == batch["soft_tokens"][0, 1]).all()
        assert len(pictures_of(table(folder, given, shape=shape).examples("train", "preference", VISION)[0][1])) == 1
    if examples.n_joint is not None:
        assert batch["joint_soft_tokens"][0].max() == 4


def test_mismatched_answers_keep_the_images_of_the_prompt(folder):
    """Two rows that ask the same about different images answer different prompts."""
    rows = [
        {"prompt": "q", "completion": f"a{i}", "label": True, "image": f"{name}.png"}
        for i, name in enumerate(["red", "blue"])
    ]
    examples, batch = batch_of(folder, "unpaired", Judgements(), *rows)
    np.testing.assert_array_equal(batch["kl_soft_tokens"], batch["soft_tokens"])
    n = examples.sequences[0][0].n_prompt
    assert batch["kl_tokens"][0, n:].tolist() == batch["tokens"][1, n:].tolist()


def test_prompts_carry_their_images_and_the_fingerprint_knows_them(folder):
    rows = [{"question": "q", "image": "red.png"}]
    examples = load(table(folder, *rows, shape=Questions()), "prompt")
    prompt = examples.prompts[0]
    assert len(prompt.soft_tokens) == len(prompt.token_ids)
    assert max(prompt.soft_tokens) == 4
    assert prompt.pictures == examples.pictures[0]
    rows[0]["image"] = "blue.png"
    assert load(table(folder, *rows, shape=Questions()), "prompt").fingerprint != examples.fingerprint


def test_one_question_about_many_images_is_split_by_image(folder):
    for i in range(40):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"{i}.png")
    data = table(folder, *(talk(text("which colour?"), image=f"{i}.png") for i in range(40)), holdout=0.5)
    n = [len(data.load(part, "conversation", TOKENIZER, VISION)) for part in ("train", "eval")]
    assert sum(n) == 40
    assert min(n) > 8
