"""Batches: dicts of numpy arrays whose first axis is rows. Which rows, is a function of (seed, step) alone.

| key | type | of | |
|---|---|---|---|
| `tokens` | int32 | [batch, time] | token ids, filled up with PAD |
| `is_answer` | bool | [batch, time] | the token is trained on: its log-probability, given those before it, counts |
| `segments` | int32 | [batch, time] | 0: padding; 1, 2, ...: the example, which sees itself alone |
| `positions` | int32 | [batch, time] | from 0 in every segment |
| `scored` | int32 | [batch, most] | places of what `is_answer` marks, then 0; only where that is far from all |
| `row` | int32 | [batch] | index of the (first) example in the dataset; -1: a row that only fills up the batch |
| `images` | uint8 | [batch, slots, size, size, 3] | where a row of the batch has one; slots without are black |
| `soft_tokens` | int32 | [batch, time] | with `images`: 1 + slot · tokens_per_image + j; 0: text |
| `is_desirable` | bool | [batch] | unpaired: the answer is a good one |
| `value` | float32 | [batch] | graded: by how much the chosen answer is better (0: not known); a label; a score |
| `kind` | int32 | [batch] | graded, where not all rows are pairs: which of these (`rlhf.data.examples.Grade`) |
| `joint_tokens` ... | | | preferences: the pair in one row (`joint.py`) |
| `kl_tokens` ... | | [batch, time] | unpaired: the row's prompt with another row's answer; the same arrays |

Prompts have `row` and `prompts`, a list of `rlhf.data.encode.Prompt`: who answers them makes the rest.

Preferences have a second axis of two, chosen and rejected: `tokens` is [batch, 2, time]; `images` are those of the
prompt, once. So have graded rows; a row with a single answer has it in the first place and padding in the second.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from rlhf.data.encode import TWO_SIDED, Examples, Prompt, TokenRow, both_sides
from rlhf.data.images import load_images
from rlhf.data.joint import join
from rlhf.errors import ConfigError

Batch = dict[str, Any]


class Order:
    """Which rows the k-th batch of a run holds.

    Each epoch is a new permutation of all rows, drawn from (seed, epoch). Epochs follow each other without a gap: a
    batch that the end of one leaves incomplete goes on with the next, so no row is left out or comes twice in an epoch.
    """

    def __init__(self, n_rows: int, batch_size: int, seed: int):
        self.n_rows = n_rows
        self.batch_size = batch_size
        self.seed = seed
        self._epochs: dict[int, np.ndarray] = {}  # the two last used

    def rows(self, step: int) -> Int[np.ndarray, "batch"]:
        """Indices of the rows of batch `step`, counted from 0."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(positions, self.n_rows)
        return np.array([self._epoch(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)])

    def steps(self, epochs: float) -> int:
        """Batches until every row was seen `epochs` times."""
        return int(np.ceil(self.n_rows * epochs / self.batch_size))

    def _epoch(self, epoch: int) -> Int[np.ndarray, "rows"]:
        if epoch not in self._epochs:
            recent = {number: order for number, order in self._epochs.items() if number == epoch - 1}
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n_rows)
            self._epochs = {**recent, epoch: order}
        return self._epochs[epoch]


class Batches:
    """Random access to the batches of a run: `batches[k]` is the k-th, whatever was read before.

    batch_size: rows of each (pairs, for preferences; packed rows, where they are packed).
    n_rows: rows of an epoch.
    fingerprint: of the rows; with the seed and a step it says what a batch holds.

    Raises:
        ConfigError: unpaired rows in batches of one, which leave no other answer for the KL estimate.
    """

    def __init__(self, examples: Examples, batch_size: int, seed: int):
        if examples.form == "unpaired" and batch_size < 2:
            raise ConfigError("algorithm.batch_size=1 must be at least 2: the KL estimate needs another row's answer")
        self.examples = examples
        self.n_rows = len(examples.packs)
        self.fingerprint = examples.fingerprint
        self.order = Order(self.n_rows, batch_size, seed)

    def __getitem__(self, step: int) -> Batch:
        return collate(self.examples, self.order.rows(step))


def more_prompts(examples: Examples, seed: int) -> Callable[[int, int], list[Prompt]]:
    """Prompts of an endless order of their own: `more_prompts(examples, seed)(start, n)` are n from place `start`."""
    order = Order(len(examples.prompts), 1, seed + 2**32)  # no run has this seed for its batches
    return lambda start, n: [examples.prompts[int(order.rows(place)[0])] for place in range(start, start + n)]


def eval_batches(examples: Examples, batch_size: int) -> Iterator[Batch]:
    """Every example once, unpacked and in order; the last batch is filled up with empty rows, whose `row` is -1."""
    alone = [(index,) for index in range(len(examples))]
    for start in range(0, len(examples), batch_size):
        chosen = alone[start : start + batch_size]
        yield _token_batch(examples, chosen, batch_size)


def collate(examples: Examples, rows: Int[np.ndarray, "batch"] | Sequence[int]) -> Batch:
    """The batch of the given rows (packs, where examples are packed)."""
    return _collate(examples, [examples.packs[row] for row in rows], len(rows))


def _collate(examples: Examples, packs: Sequence[tuple[int, ...]], batch_size: int) -> Batch:
    if examples.form == "prompt":
        rows = [index for pack in packs for index in pack]
        return {"prompts": [examples.prompts[row] for row in rows], "row": np.array(rows, np.int32)}
    return _token_batch(examples, packs, batch_size)


def collate_tokens(examples: Examples, rows: Int[np.ndarray, "batch"] | Sequence[int]) -> Batch:
    """The tokens of the given rows whatever their form: prompts too, up to where the answer begins. For looking."""
    return _token_batch(examples, [examples.packs[row] for row in rows], len(rows))


def _token_batch(examples: Examples, packs: Sequence[tuple[int, ...]], batch_size: int) -> Batch:
    shown = [[picture for index in pack for picture in examples.pictures[index]] for pack in packs]
    has_images = any(shown)
    batch = _empty(examples, batch_size, has_images)
    if has_images and examples.vision is not None:
        shown += [[]] * (batch_size - len(packs))
        batch["images"] = load_images(shown, examples.n_slots, examples.vision.image_size)
    for place, pack in enumerate(packs):
        batch["row"][place] = pack[0]
        if examples.form in TWO_SIDED:
            for side, row in enumerate(examples.sequences[pack[0]]):
                _write(batch, (place, side), [row])
        else:
            _write(batch, (place,), [examples.sequences[index][0] for index in pack])
    if examples.n_joint is not None:
        sides = [examples.sequences[pack[0]] for pack in packs]
        pairs = [both_sides(rows) for rows in sides]
        soft_tokens = [rows[0].soft_tokens for rows in sides] if has_images else None
        batch |= join(pairs, examples.n_joint, examples.n_time, batch_size, examples.pad, soft_tokens)
    if examples.form == "unpaired":
        batch["is_desirable"] = np.zeros(batch_size, bool)
        batch["is_desirable"][: len(packs)] = [examples.is_desirable[pack[0]] for pack in packs]
        batch |= _mismatched(examples, [pack[0] for pack in packs], batch_size, has_images)
    if examples.form == "graded":
        batch |= _grades(examples, [pack[0] for pack in packs], batch_size)
    if examples.n_scored is not None:
        marks = {name: x for name, x in batch.items() if name.endswith("is_answer")}
        batch |= {name.replace("is_answer", "scored"): _places(x, examples.n_scored) for name, x in marks.items()}
    return batch


def _places(is_marked: np.ndarray, n: int) -> np.ndarray:
    """The places of the marked tokens of each row, in order; 0 fills up."""
    order = np.argsort(~is_marked, axis=-1, kind="stable")[..., :n]
    return np.where(np.take_along_axis(is_marked, order, axis=-1), order, 0).astype(np.int32)


def _grades(examples: Examples, rows: Sequence[int], batch_size: int) -> Batch:
    grades = {"kind": np.zeros(batch_size, np.int32), "value": np.zeros(batch_size, np.float32)}
    for place, row in enumerate(rows):
        grades["kind"][place], grades["value"][place] = examples.grades[row]
    return grades if examples.is_mixed else {"value": grades["value"]}


def _empty(examples: Examples, batch_size: int, has_images: bool) -> Batch:
    shape = (batch_size, 2, examples.n_time) if examples.form in TWO_SIDED else (batch_size, examples.n_time)
    soft_tokens = {"soft_tokens": np.zeros(shape, np.int32)} if has_images else {}
    return soft_tokens | {
        "tokens": np.full(shape, examples.pad, np.int32),
        "is_answer": np.zeros(shape, bool),
        "segments": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "row": np.full(batch_size, -1, np.int32),
    }


def _write(batch: Batch, place: tuple[int, ...], token_rows: Sequence[TokenRow]) -> None:
    """Put examples one behind the other into one row, and their images into one slot behind the other."""
    start = n_soft = 0
    for segment, row in enumerate(token_rows, start=1):
        end = start + len(row.tokens)
        batch["tokens"][place][start:end] = row.tokens
        batch["is_answer"][place][start:end] = row.is_answer
        batch["segments"][place][start:end] = segment
        batch["positions"][place][start:end] = np.arange(end - start)
        if row.soft_tokens is not None:
            batch["soft_tokens"][place][start:end] = np.where(row.soft_tokens > 0, row.soft_tokens + n_soft, 0)
            n_soft += int(row.soft_tokens.max())
        start = end


def _mismatched(examples: Examples, rows: Sequence[int], batch_size: int, has_images: bool) -> Batch:
    """Each prompt with the answer of the next row that answers another prompt (Ethayarajh et al., 2024, section 4.1).

    Where all rows answer the same prompt, it is the next row's.
    """
    other = _empty(examples, batch_size, has_images)
    prompts = [_prompt_key(examples, index) for index in rows]
    for place, index in enumerate(rows):
        following = [(place + ahead) % len(rows) for ahead in range(1, len(rows) + 1)]
        answered = next((there for there in following if prompts[there] != prompts[place]), following[0])
        _write(other, (place,), [_joined(examples, index, rows[answered])])
    return {f"kl_{name}": x for name, x in other.items() if name != "row"}


def _prompt_key(examples: Examples, index: int) -> tuple[bytes, ...]:
    """Equal for examples that answer the same prompt about the same images."""
    row = examples.sequences[index][0]
    return row.tokens[: row.n_prompt].tobytes(), *(picture.key.encode() for picture in examples.pictures[index])


def _joined(examples: Examples, prompt_of: int, answer_of: int) -> TokenRow:
    asked, answered = examples.sequences[prompt_of][0], examples.sequences[answer_of][0]
    tokens = np.concatenate([asked.tokens[: asked.n_prompt], answered.tokens[answered.n_prompt :]])
    is_answer = np.concatenate([np.zeros(asked.n_prompt, bool), answered.is_answer[answered.n_prompt :]])
    soft_tokens = asked.soft_tokens
    if soft_tokens is not None:
        soft_tokens = np.pad(soft_tokens[: asked.n_prompt], (0, len(tokens) - asked.n_prompt))[: examples.n_time]
    return TokenRow(tokens[: examples.n_time], is_answer[: examples.n_time], asked.n_prompt, soft_tokens)
