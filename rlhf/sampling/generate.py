"""Generation: prompts in, tokens with their log-probabilities out. Knows token ids only; text is others' business.

Prompt length, answer length, prompts and answers at once are rounded up to buckets, and everything else is data, so
programs are compiled once per bucket and serve every prompt, method, number and stop list after that.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key

from rlhf.errors import ConfigError, DataError
from rlhf.model.gemma3 import Gemma3, Tree
from rlhf.sampling.ahead import compile_ahead
from rlhf.sampling.methods import Method, numbers_of
from rlhf.sampling.programs import Setting
from rlhf.sampling.rules import Rules
from rlhf.sampling.schedule import Ended, PromptImages, Schedule, Task
from rlhf.sampling.shapes import SLOTS, Shape, check_fits, shape_for
from rlhf.sampling.side_by_side import parts_of, run_side_by_side
from rlhf.sampling.weights import DecodingWeights

WATCH_EVERY = 16  # tokens between two looks at the text, where something in it ends an answer


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated; row i * n + j is the j-th sample of prompt i, and places after its end are 0.

    tokens: the stop token included.
    logprobs: of each token under softmax(logits / temperature) of the whole vocabulary, nats: what a trainer computes
        at that temperature. Greedy decoding has no such temperature and reports those of temperature 1.
    filtered_logprobs: under the distribution that the token was drawn from; 0 for greedy decoding.
    entropies: of the distributions of `logprobs`, nats; None unless asked for.
    likely: ids and log-probabilities of the most likely tokens at each place, [rows, time, n] each; None unless asked
        for.
    n_tokens: of each row.
    finish_reasons: of each row `stop` (a stop token), `stop_text` (something in the text) or `length` (cut).
    utilisation: share of the places of the compiled shape that a token was drawn in.
    """

    tokens: Int[np.ndarray, "rows time"]
    logprobs: Float[np.ndarray, "rows time"]
    filtered_logprobs: Float[np.ndarray, "rows time"]
    entropies: Float[np.ndarray, "rows time"] | None
    likely: tuple[np.ndarray, np.ndarray] | None
    n_tokens: Int[np.ndarray, "rows"]
    finish_reasons: list[str]
    utilisation: float = 1.0

    @property
    def is_finished(self) -> Bool[np.ndarray, "rows"]:
        """Whether each row came to its end; else it was cut at `max_new_tokens`."""
        return np.array([reason != "length" for reason in self.finish_reasons])

    def answers(self) -> list[list[int]]:
        """The token ids of each row, without the stop token."""
        ends = [n - (reason == "stop") for n, reason in zip(self.n_tokens, self.finish_reasons, strict=True)]
        return [row[:end].tolist() for row, end in zip(self.tokens, ends, strict=True)]


def generate(
    model: Gemma3,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    n: int = 1,
    method: Method | Sequence[Method],
    max_new_tokens: int | Sequence[int],
    key: Key[Array, ""],
    stop_ids: Collection[int],
    min_new_tokens: int = 0,
    forbidden_ids: Collection[int] = (),
    bias: Mapping[int, float] | None = None,
    watch: Callable[[list[int]], int | None] | None = None,
    rows: Sequence[int] | None = None,
    pictures: Sequence[PromptImages | None] | None = None,
    wants_entropy: bool = False,
    n_alternatives: int = 0,
    slots: int = SLOTS,
    shape: Shape | None = None,
    weights: DecodingWeights | None = None,
    cache_dtype: str | None = None,
) -> Generation:
    """Continue each prompt `n` times, until a stop token, `watch`, or `max_new_tokens`.

    Each prompt runs through the model once, whatever `n` is, and its keys and values are in memory once. The noise of a
    token depends on `key`, the prompt's number in `rows` (its place, if not given), the sample's number and the token's
    position; on nothing else in the batch.

    method, max_new_tokens: of all prompts, or one for each.
    min_new_tokens: no stop token is drawn before.
    forbidden_ids: never drawn. bias: added to the logits of these ids. Log-probabilities are those without either.
    watch: told the token ids of an answer so far, every few tokens; says after how many of them it ends, if it does.
    pictures: the images of each prompt.
    n_alternatives: report so many of the most likely tokens at each place.
    slots: answers that are written at once; further ones wait, and enter as others end.
    shape: what to compile for, instead of the bucket of the call: any number of prompts and samples go through it.
    weights: keeps the layout of the parameters between calls.
    cache_dtype: of kept keys and values; that of the activations if not given.

    Raises:
        DataError: no prompt, an empty one, or a token id outside the vocabulary.
        ConfigError: a number out of range, no token left to draw, or a prompt or answer longer than the given shape.
    """
    vocab = model.architecture.vocab_size
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    most = max(limits, default=1)
    check_prompts(prompts, n, min(limits, default=1), vocab)
    rules = rules_for(vocab, stop_ids, forbidden_ids, bias or {}, min_new_tokens, wants_entropy)
    tasks = _tasks(prompts, n, rows, method, min_new_tokens, limits, pictures)
    longest = max(map(len, prompts))
    if shape is None:
        shape = shape_for(len(prompts), n, longest, most, slots, n_alternatives > 0)
    check_fits(shape, longest, most, n_alternatives)
    weights = DecodingWeights(model) if weights is None else weights
    setting, layers = setting_for(weights.model, params, cache_dtype), weights.of(params)
    parts = parts_of(setting, shape, layers)
    compile_ahead(setting, parts, layers, rules, key)
    begin = functools.partial(Schedule, setting, parts.shape, layers, rules, key, watch=watch)
    ended, utilisation = run_side_by_side(parts, tasks, begin, None if watch is None else WATCH_EVERY)
    return _gathered(ended, most, utilisation, wants_entropy, n_alternatives)


def _tasks(
    prompts: Sequence[Sequence[int]],
    n: int,
    rows: Sequence[int] | None,
    method: Method | Sequence[Method],
    least: int,
    limits: Sequence[int],
    pictures: Sequence[PromptImages | None] | None,
) -> list[Task]:
    rows = range(len(prompts)) if rows is None else rows
    methods = [method] * len(prompts) if isinstance(method, Method) else list(method)
    images = [None] * len(prompts) if pictures is None else list(pictures)
    named = {"row numbers": rows, "methods": methods, "pictures": images, "max_new_tokens": limits}
    for name, values in named.items():
        if len(values) != len(prompts):
            raise DataError(f"{len(prompts)} prompts need as many {name}, not {len(values)}")
    numbers = np.stack(numbers_of(methods), axis=1).tolist()
    return [
        Task(tuple(prompt), n, row, tuple(own), min(least, most), most, some)
        for prompt, row, own, most, some in zip(prompts, rows, numbers, limits, images, strict=True)
    ]


def setting_for(model: Gemma3, params: Tree, cache_dtype: str | None = None) -> Setting:
    """How a model with these parameters generates: on the mesh on which they are."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh: Mesh | None = None
    if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
        mesh = sharding.mesh  # type: ignore[assignment]
    return Setting(model, model.compute_dtype if cache_dtype is None else cache_dtype, mesh)


def rules_for(
    vocab: int,
    stop_ids: Collection[int],
    forbidden_ids: Collection[int],
    bias: Mapping[int, float],
    min_new_tokens: int,
    wants_entropy: bool,
) -> Rules:
    """The rules of a call as arrays.

    Raises:
        ConfigError: nothing would be left to draw, or a bias is of no token or no number.
    """
    for token, value in bias.items():
        if not 0 <= token < vocab:
            raise ConfigError(f"bias names token {token}, and the model's vocabulary ends at {vocab - 1}")
        if np.isnan(value) or value == np.inf:
            raise ConfigError(f"bias of token {token} is {value}; it must be a number, or -inf to forbid it")
    forbidden = frozenset(i for i in forbidden_ids if 0 <= i < vocab)
    forbidden |= {token for token, value in bias.items() if value == -np.inf}
    stops = frozenset(i for i in stop_ids if 0 <= i < vocab)
    if len(forbidden) == vocab:
        raise ConfigError("forbidden_ids names every token of the vocabulary: nothing is left to generate")
    if min_new_tokens and len(forbidden | stops) == vocab:
        raise ConfigError(f"min_new_tokens={min_new_tokens} leaves nothing to draw: every token is forbidden or a stop")
    is_stop, forbids = _is_among(stops, vocab), _is_among(forbidden, vocab)
    added = np.where(forbids, np.float32(-np.inf), np.float32(0))
    for token, value in bias.items():
        added[token] += value
    return Rules(jnp.asarray(added), jnp.asarray(is_stop), jnp.asarray(wants_entropy))


@functools.lru_cache(maxsize=16)
def _is_among(ids: frozenset[int], vocab: int) -> Bool[np.ndarray, "vocab"]:
    """For every token id whether it is one of `ids`."""
    is_among = np.zeros(vocab, bool)
    is_among[list(ids)] = True
    return is_among


def _gathered(
    ended: Iterable[Ended], max_new_tokens: int, utilisation: float, wants_entropy: bool, n_alternatives: int
) -> Generation:
    """Answers as arrays, in the order of their prompts and samples."""
    ordered = sorted(ended, key=lambda one: (one.task, one.sample))
    tokens = np.zeros((len(ordered), max_new_tokens), np.int32)
    scores = np.zeros((3, len(ordered), max_new_tokens), np.float32)
    first = ordered[0].likely
    n_likely = 0 if first is None else min(n_alternatives, first[0].shape[1])
    ids = np.zeros((len(ordered), max_new_tokens, n_likely), np.int32)
    logprobs = np.zeros(ids.shape, np.float32)
    for row, one in enumerate(ordered):
        end = len(one.tokens)
        tokens[row, :end], scores[:, row, :end] = one.tokens, one.scores.T
        if n_likely and one.likely is not None:
            ids[row, :end], logprobs[row, :end] = (x[:, :n_likely] for x in one.likely)
    return Generation(
        tokens=tokens,
        logprobs=scores[0],
        filtered_logprobs=scores[1],
        entropies=scores[2] if wants_entropy else None,
        likely=(ids, logprobs) if n_alternatives else None,
        n_tokens=np.array([len(one.tokens) for one in ordered], np.int32),
        finish_reasons=[one.reason for one in ordered],
        utilisation=utilisation,
    )


def check_prompts(prompts: Sequence[Sequence[int]], n: int, max_new_tokens: int, vocab: int) -> None:
    """Raises: see `generate`."""
    for name, value in (("n", n), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    if not len(prompts):
        raise DataError("there is no prompt to continue")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {number} is empty: it needs at least the BOS token")
        if min(prompt) < 0 or max(prompt) >= vocab:
            wrong = next(i for i in prompt if not 0 <= i < vocab)
            raise DataError(f"prompt {number} holds token {wrong}, and the model's vocabulary ends at {vocab - 1}")
