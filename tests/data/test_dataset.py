"""From files to examples: odd files, bad rows, field maps, conversions, splits, and every real slice."""

import dataclasses
import gc
import json
import logging
from pathlib import Path

import hydra.utils
import omegaconf
import pytest

from rlhf.config import config
from rlhf.data.arithmetic import Arithmetic
from rlhf.data.batches import Batches
from rlhf.data.colours import Colours
from rlhf.data.dataset import Dataset, Table
from rlhf.data.rows import Conversations, Judgements, Preferences, Questions
from rlhf.data.sources import RawRow
from rlhf.errors import ConfigError, DataError
from rlhf.model.tokenizer import Tokenizer

TOKENIZER = Tokenizer()
CONF = Path(__file__).resolve().parents[2] / "conf" / "dataset"


def row(question="q", answer="a") -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def pair(question="q", chosen="a", rejected="b") -> dict:
    return {"chosen": row(question, chosen)["messages"], "rejected": row(question, rejected)["messages"]}


def table(path, rows=None, **settings) -> Table:
    settings = {"max_length": 256, **settings}
    return Table(rows=rows or Conversations(), path=str(path), **settings)


def write(path, *rows, end="\n") -> Path:
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
    path.write_bytes(b"\n".join(lines) + end.encode())
    return path


def texts(dataset, part="train", form="conversation") -> list[str]:
    examples = dataset.load(part, form, TOKENIZER)
    return [TOKENIZER.decode(group[0].tokens.tolist()) for group in examples.sequences]


def said(*turns: str) -> str:
    return "".join(f"{role}\n{turn}\n" for role, turn in zip(("user", "model") * len(turns), turns, strict=False))


ODD_ROWS = {
    "byte_order_mark": b"\xef\xbb\xbf" + json.dumps(row("bom")).encode(),
    "crlf": json.dumps(row("crlf")).encode() + b"\r",
    "line_separator": json.dumps(row("one\u2028two"), ensure_ascii=False).encode(),
    "control_tokens": json.dumps(row("<end_of_turn>\n<start_of_turn>model", "<bos><eos>")).encode(),
}


@pytest.mark.parametrize("name", ODD_ROWS)
def test_odd_rows_that_are_trained_on(tmp_path, name):
    path = write(tmp_path / "rows.jsonl", ODD_ROWS[name], row("next"))
    expected = json.loads(ODD_ROWS[name].decode("utf-8-sig"))["messages"]
    assert texts(table(path)) == [said(*(turn["content"] for turn in expected)), said("next", "a")]


def test_a_row_of_a_megabyte_is_trained_on_or_counted(tmp_path):
    path = write(tmp_path / "rows.jsonl", row("long", "wörd " * 200_000), row())
    examples = table(path, on_long="truncate").load("train", "conversation", TOKENIZER)
    assert [len(group[0].tokens) for group in examples.sequences] == [256, 13]
    assert (examples.n_truncated, examples.n_dropped) == (1, 0)
    assert table(path, on_long="drop").load("train", "conversation", TOKENIZER).n_dropped == 1


BAD_ROWS = {
    "truncated": (b'{"messages": [{"role": "user", "con', "no JSON: Unterminated string"),
    "missing_field": ({"message": []}, "there is no column 'messages' (there are: message); did you mean 'message'?"),
    "nan": (b'{"messages": [], "score": NaN}', "NaN is no JSON number"),
    "lone_surrogate": (rb'{"messages": [], "x": "\ud800"}', "field 'x' holds U+D800, half of a surrogate pair"),
    "no_answer": ({"messages": row()["messages"][:1]}, "the last turn is the user's: there is no answer to learn"),
    "empty_answer": (row("q", " "), "the turn 2 (assistant) is empty"),
    "latin1": (b'{"messages": "caf\xe9"}', "is no UTF-8 (0xe9)"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_with_file_line_and_reason(tmp_path, name):
    line, reason = BAD_ROWS[name]
    path = write(tmp_path / "rows.jsonl", row(), line, end="" if name == "truncated" else "\n")
    with pytest.raises(DataError) as caught:
        table(path).load("train", "conversation", TOKENIZER)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert reason in message
    assert message.endswith("(dataset.on_bad_row=skip leaves such rows out)")
    assert ("the file may be cut off" in message) == (name == "truncated")


def test_bad_rows_are_left_out_and_counted(tmp_path, caplog):
    path = write(tmp_path / "rows.jsonl", row("q", ""), row(), b"{", row("p", ""), row("r"))
    with caplog.at_level(logging.INFO):
        assert texts(table(path, on_bad_row="skip")) == [said("q", "a"), said("r", "a")]
    assert "train: 3 of 5 rows can't be used and are left out:" in caplog.messages
    assert f"  2 × the turn 2 (assistant) is empty (first: {path}:1)" in caplog.messages
    assert any(m.startswith("  1 × no JSON: Expecting property name") for m in caplog.messages)


def test_no_usable_row_is_an_error_even_then(tmp_path):
    path = write(tmp_path / "rows.jsonl", row("q", ""), row("p", ""))
    reason = (
        r"there are no rows for train: 2 read, 2 of them bad; 2 × the turn 2 \(assistant\) is empty \(first: .*:1\)"
    )
    with pytest.raises(DataError, match=reason):
        table(path, on_bad_row="skip").load("train", "conversation", TOKENIZER)
    with pytest.raises(DataError, match="holds no rows"):
        table(write(tmp_path / "empty.jsonl", end="")).load("train", "conversation", TOKENIZER)


def test_a_limit_counts_usable_rows_and_reports_the_bad_ones(tmp_path, caplog):
    path = write(tmp_path / "rows.jsonl", row("1"), row("q", ""), row("2"), row("3"))
    with caplog.at_level(logging.INFO):
        assert texts(table(path, limit=2, on_bad_row="skip")) == [said("1", "a"), said("2", "a")]
    assert "train: 1 of 3 rows can't be used and are left out:" in caplog.messages
    assert texts(table(path, limit=1)) == [said("1", "a")]  # the bad row is not reached


def test_system_prompt_for_the_rows_that_have_none(tmp_path):
    own = {"messages": [{"role": "system", "content": "mine"}, *row()["messages"]]}
    path = write(tmp_path / "rows.jsonl", row(), own)
    assert texts(table(path, system_prompt="ours")) == [said("ours\n\nq", "a"), said("mine\n\nq", "a")]


def test_splits_of_a_folder_and_a_file_for_evaluation(tmp_path):
    write(tmp_path / "train.jsonl", row("train"))
    other = write(tmp_path / "test.jsonl", row("test"))
    folder = table(tmp_path)
    assert folder.has_eval()
    assert texts(folder, "eval") == [said("test", "a")]
    single = table(tmp_path / "train.jsonl")
    assert not single.has_eval()
    with pytest.raises(DataError, match=r"there are no evaluation rows: .* set dataset.eval_path, or dataset.holdout"):
        texts(single, "eval")
    given = table(tmp_path / "train.jsonl", eval_path=str(other))
    assert given.has_eval()
    assert texts(given, "eval") == [said("test", "a")]
    with pytest.raises(DataError, match=r"dataset.eval_path=.*tset\.jsonl: there is no such file .* 'test.jsonl'"):
        texts(table(tmp_path / "train.jsonl", eval_path=str(tmp_path / "tset.jsonl")), "eval")


def test_a_held_out_share_is_disjoint_by_prompt(tmp_path):
    rows = [pair(f"q{number // 2}", "a", f"b{number}") for number in range(400)]
    dataset = table(write(tmp_path / "rows.jsonl", *rows), Preferences(), holdout=0.2)
    assert dataset.has_eval()
    parts = {
        part: [example.prompt for _, example in dataset.examples(part, "preference")] for part in ("train", "eval")
    }
    assert len(parts["train"]) + len(parts["eval"]) == 400
    assert not set(parts["train"]) & set(parts["eval"])
    assert 50 < len(parts["eval"]) < 110
    write(tmp_path / "test.jsonl", pair())
    (tmp_path / "rows.jsonl").rename(tmp_path / "train.jsonl")
    assert table(tmp_path, Preferences(), holdout=0.2).held_out() == 0.0  # there is an evaluation split


def test_conversions(tmp_path, caplog):
    preferences = table(write(tmp_path / "pairs.jsonl", pair("q", "good", "bad")), Preferences())
    with caplog.at_level(logging.INFO):
        assert texts(preferences, form="conversation") == [said("q", "good")]
    assert "the chosen answers are trained on, the rejected ones left out" in caplog.text
    unpaired = preferences.load("train", "unpaired", TOKENIZER)
    assert unpaired.is_desirable == [True, False]
    assert texts(preferences, form="unpaired") == [said("q", "good"), said("q", "bad")]
    assert texts(preferences, form="prompt") == ["user\nq\nmodel\n"]
    conversations = table(write(tmp_path / "talk.jsonl", row()))
    assert texts(conversations, form="prompt") == ["user\nq\nmodel\n"]
    questions = table(
        write(tmp_path / "sums.jsonl", {"question": "q", "answer": "w #### 2"}), Questions(answer="answer")
    )
    assert texts(questions, form="conversation") == [said("q", "w #### 2")]
    prompts = table(tmp_path / "sums.jsonl", Questions())
    with pytest.raises(DataError, match="the row has a prompt but no answer to train on"):
        texts(prompts, form="conversation")


@pytest.mark.parametrize(
    ("rows", "form"),
    [
        (Conversations(), "preference"),
        (Conversations(), "unpaired"),
        (Questions(), "preference"),
        (Questions(), "unpaired"),
        (Judgements(), "preference"),
        (Judgements(), "conversation"),
    ],
)
def test_impossible_conversions_are_refused_before_anything_is_read(rows, form):
    reason = (
        f"the algorithm trains on rows of form '{form}', but this dataset has rows of form '{rows.form}', from which"
    )
    with pytest.raises(ConfigError, match=reason):
        table("nowhere.jsonl", rows).check(form)


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"set dataset.path \(files\) or dataset.hub"):
        Table(rows=Conversations(), max_length=64)
    with pytest.raises(ConfigError, match=r"dataset.hub_subset='main' needs dataset.hub"):
        Table(rows=Conversations(), max_length=64, path="x.jsonl", hub_subset="main")
    for name, value in (("max_length", 8), ("limit", 0), ("eval_limit", 0), ("holdout", 1.0)):
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            Table(**{"rows": Conversations(), "path": "x.jsonl", "max_length": 64, name: value})


def test_collection_of_garbage_goes_on_after_loading(tmp_path):
    assert gc.isenabled()
    with pytest.raises(DataError):
        texts(table(tmp_path / "none.jsonl"))
    assert gc.isenabled()


@config
class Capitals(Dataset):
    """A dataset of one's own: what the rows are, and where they come from.

    n_train: rows of the training split.
    """

    n_train: int = 3

    def row_format(self, form):
        return Questions(question="country", answer="capital")

    def raw_rows(self, part, form):
        for number in range(self.n_train):
            yield RawRow(f"capitals row {number}", {"country": f"country {number}", "capital": f"city {number}"})


def test_a_dataset_of_ones_own():
    dataset = Capitals(max_length=64)
    assert [prompt.answer for prompt in dataset.load("train", "prompt", TOKENIZER).prompts] == [
        "city 0",
        "city 1",
        "city 2",
    ]
    assert texts(dataset)[0] == said("country 0", "city 0")
    with pytest.raises(ConfigError, match="this dataset has rows of form 'prompt'"):
        dataset.check("preference")


def built(name, **settings):
    settings = {"max_length": 256, "on_long": "truncate", **settings}
    config = omegaconf.OmegaConf.merge(omegaconf.OmegaConf.load(CONF / f"{name}.yaml"), settings)
    return hydra.utils.instantiate(config, _convert_="all")


REAL = {  # folder, its form, usable rows of both splits
    "no_robots": ("no_robots_form", "conversation", 759, 98),
    "capybara_dpo": ("capybara_dpo_form", "preference", 241, 43),
    "hh_rlhf": ("hh_rlhf", "preference", 1254, 199),
    "gsm8k": ("gsm8k", "prompt", 2000, 400),
}


@pytest.mark.parametrize("name", REAL)
def test_every_real_slice_loads(shared, name):
    folder, form, n_train, n_eval = REAL[name]
    dataset = built(name, path=str(shared / "data" / folder))
    for part, n_rows in (("train", n_train), ("eval", n_eval)):
        examples = dataset.load(part, form, TOKENIZER)
        assert len(examples) == n_rows
        assert max(len(row.tokens) for group in examples.sequences for row in group) <= 256
        if form != "prompt":
            assert all(row.is_answer.any() for group in examples.sequences for row in group)
    batch = Batches(examples, 4, seed=0)[0]
    if form == "prompt":
        assert [prompt.row for prompt in batch["prompts"]] == batch["row"].tolist()
    else:
        assert batch["tokens"].shape[-1] == examples.n_time


def test_why_rows_of_hh_rlhf_are_left_out(shared, caplog):
    with caplog.at_level(logging.INFO):
        built("hh_rlhf", path=str(shared / "data/hh_rlhf")).examples("train", "preference")
    counted = [m for m in caplog.messages if " × " in m]
    assert "train: 7 of 1261 rows can't be used and are left out:" in caplog.messages
    assert sum(int(m.split(" × ")[0]) for m in counted if "the answer is empty" in m) == 3
    assert sum(int(m.split(" × ")[0]) for m in counted if "roles must alternate" in m) == 4
    with pytest.raises(DataError, match=r"train\.jsonl:\d+: column '(chosen|rejected)': "):
        built("hh_rlhf", path=str(shared / "data/hh_rlhf"), on_bad_row="error").examples("train", "preference")


def test_gsm8ks_reference_answers(shared):
    dataset = built("gsm8k", path=str(shared / "data/gsm8k"), limit=3)
    prompts = dataset.load("train", "prompt", TOKENIZER).prompts
    assert [prompt.answer for prompt in prompts] == ["72", "10", "5"]
    solved = dataset.load("train", "conversation", TOKENIZER)
    assert len(solved) == 3


def test_the_mixed_pairs_with_system_messages(shared):
    path = str(shared / "data/capybara_dpo_form/mixed_demo.jsonl")
    examples = built("preference_jsonl", path=path).examples("train", "preference")
    assert len(examples) == 197
    assert sum(example.prompt[0].role == "system" for _, example in examples) == 49


@pytest.mark.parametrize(
    "path", sorted(path for path in CONF.glob("*.yaml") if path.stem != "mixture"), ids=lambda path: path.stem
)
def test_every_yaml_names_every_setting(path):
    """A key that is not an argument can't be built; an argument that is not a key can't be found by a user."""
    config = omegaconf.OmegaConf.load(path)
    dataset = built(path.stem, **({"path": "x.jsonl"} if "rows" in config else {}))
    assert set(config) - {"_target_"} == {field.name for field in dataclasses.fields(dataset)}
    if isinstance(dataset, Table):
        assert set(config.rows) - {"_target_"} == {field.name for field in dataclasses.fields(dataset.rows)}
    else:
        assert isinstance(dataset, Arithmetic | Colours)
