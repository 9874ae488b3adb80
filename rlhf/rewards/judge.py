"""A language model as a judge (RLAIF): a score on a rubric, or which of two answers is better, asked in both orders."""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf.config import config, require_range
from rlhf.errors import ConfigError, DataError, TrainingError
from rlhf.rewards.base import Answered, Failed, Judgements, OnError, Reward, Scorer
from rlhf.rewards.endpoint import Endpoint, ask_all
from rlhf.rewards.judge_cache import ReplyCache

log = logging.getLogger(__name__)

RUBRIC = "Judge how well the answer helps the person who asked: is it right, complete, clear and no longer than needed?"
_SCORE = re.compile(r"score: ?(-?[0-9]{1,6}(?:\.[0-9]{1,6})?)(?: ?/ ?[0-9]{1,6})?\.?")
_BETTER = re.compile(r"better: ?(a|b|tie)\.?")
_TURN = re.compile(r"<start_of_turn>(user|model)\n")

Ask = Callable[[Sequence[str]], list[str | Failed]]


@config
class Judge(Reward):
    """0 to 1: where the judge puts an answer on the scale, or how often it prefers it.

    checkpoint: a Gemma 3 checkpoint that judges; or endpoint: URL of an OpenAI-compatible server, up to `/v1`, with the
        name of its model. key_variable: environment variable that holds its key.
    mode: `score`: from `lowest` to `highest`. `reference`: which is better, the answer or the dataset's reference.
        `group`: which is better of two answers to the same prompt that follow each other, the last and the first too.
        Comparisons are asked in both orders; a verdict that depends on the order counts as a tie.
    rubric: what the judge is asked to heed.
    max_new_tokens: of a reply. Its last line must be `Score: 7` or `Better: A`, `B` or `tie`; anything else fails.
    timeout_seconds: for all of a step together. request_seconds: for one attempt. retries: further ones. parallel:
        requests at once. These four are of an endpoint.
    cache: a file that keeps replies for later runs; none keeps none.
    on_error: `stop` the run at an answer that could not be judged, or `mask` it.
    """

    checkpoint: str | None = None
    endpoint: str | None = None
    model: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    mode: Literal["score", "reference", "group"] = "score"
    rubric: str = RUBRIC
    lowest: int = 1
    highest: int = 10
    max_new_tokens: int = 256
    timeout_seconds: float = 120.0
    request_seconds: float = 30.0
    retries: int = 2
    parallel: int = 8
    cache: str | None = "outputs/judge.jsonl"
    on_error: OnError = "mask"

    def __post_init__(self):
        if (self.checkpoint is None) == (self.endpoint is None):
            raise ConfigError("Judge needs checkpoint=… or endpoint=…, one of them: who judges?")
        if self.endpoint is not None and self.model is None:
            raise ConfigError(f"model of Judge is missing: the name of a model of endpoint={self.endpoint}")
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint={self.endpoint} of Judge must begin with http:// or https://")
        if self.lowest >= self.highest:
            raise ConfigError(f"lowest={self.lowest} of Judge must be less than highest={self.highest}")
        require_range(self, "timeout_seconds", "request_seconds", above=0)
        require_range(self, "max_new_tokens", "parallel", at_least=1)
        require_range(self, "retries", at_least=0)

    def connect(self, load: Callable[[str], Any]) -> Scorer:
        if self.checkpoint is not None:
            loaded = load(self.checkpoint)
            return _Judging(self, loaded.identity, lambda texts: list(loaded.answer(texts, self.max_new_tokens)))
        assert self.endpoint is not None
        assert self.model is not None
        server = Endpoint(
            self.endpoint, self.model, self.key_variable, self.max_new_tokens, self.request_seconds, self.retries
        )
        ask = server.ask
        return _Judging(self, server.url, lambda texts: ask_all(ask, texts, self.parallel, self.timeout_seconds))

    def __call__(self, answers: Sequence[Answered], step: int) -> Judgements:
        if self.checkpoint is not None:
            raise ConfigError("the reward judge with a checkpoint must be connected before it is called")
        return self.connect(lambda checkpoint: None)(answers, step)


class _Judging(Scorer):
    def __init__(self, judge: Judge, who: str, ask: Ask):
        self.judge, self.who, self._ask = judge, who, ask
        self.cache = ReplyCache(None if judge.cache is None else Path(judge.cache))
        self._metrics: dict[str, float] = {}
        self._unparsable = 0.0

    def metrics(self):
        """unparsable: share of replies that could not be read; order_dependent: of comparisons whose verdict changed
        with the order."""
        return self._metrics

    def __call__(self, answers: Sequence[Answered], step: int) -> Judgements:
        if not answers:
            return []
        if self.judge.mode == "score":
            verdicts = self._verdicts([self._scoring(answer) for answer in answers], self._read_score)
            self._metrics = {"unparsable": self._unparsable}
            return verdicts
        pairs = self._pairs(answers)
        texts = [
            self._comparing(one, *both) for one, first, second in pairs for both in ((first, second), (second, first))
        ]
        found = self._verdicts(texts, _read_better)
        wins = [_agreed(found[place], found[place + 1]) for place in range(0, len(found), 2)]
        changed = [
            forth + back != 1
            for forth, back in zip(found[::2], found[1::2], strict=True)
            if not isinstance(forth, Failed) and not isinstance(back, Failed)
        ]
        self._metrics = {"unparsable": self._unparsable, "order_dependent": sum(changed) / max(len(changed), 1)}
        return wins if self.judge.mode == "reference" else _of_rings(answers, wins)

    def _verdicts(self, texts: Sequence[str], read: Callable[[str], float | Failed]) -> list[float | Failed]:
        """What the replies to some questions say."""
        replies = self._replies(texts)
        answered = [reply for reply in replies if not isinstance(reply, Failed)]
        if not answered:
            first = next(reply for reply in replies if isinstance(reply, Failed))
            raise TrainingError(f"reward judge: none of {len(texts)} questions was answered: {first.reason}")
        found = [reply if isinstance(reply, Failed) else read(reply) for reply in replies]
        n_read = sum(not isinstance(verdict, Failed) for verdict in found)
        self._unparsable = 1 - n_read / len(answered)
        return found

    def _replies(self, texts: Sequence[str]) -> list[str | Failed]:
        """From the cache, or asked now; equal questions are asked once."""
        keys = [ReplyCache.key(self.who, self.judge.model, self.judge.max_new_tokens, text) for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if self.cache.get(key) is None}
        asked = dict(zip(new, self._ask(list(new.values())), strict=True)) if new else {}
        self.cache.add({key: reply for key, reply in asked.items() if isinstance(reply, str)})
        found = [self.cache.get(key) for key in keys]
        return [asked[key] if reply is None else reply for key, reply in zip(keys, found, strict=True)]

    def _scoring(self, answer: Answered) -> str:
        judge = self.judge
        return (
            f"{judge.rubric}\n\n{conversation(answer.prompt)}{_reference(answer)}\n\n[Answer]\n{answer.completion}\n"
            f"[End of the answer]\n\nGive a score from {judge.lowest} (worst) to {judge.highest} (best). The last line "
            "of your reply must be\nScore: <number>"
        )

    def _comparing(self, answer: Answered, first: str, second: str) -> str:
        return (
            f"{self.judge.rubric}\n\n{conversation(answer.prompt)}\n\n[Answer A]\n{first}\n[End of answer A]\n\n"
            f"[Answer B]\n{second}\n[End of answer B]\n\nWhich answer is better? The last line of your reply must be "
            "one of\nBetter: A\nBetter: B\nBetter: tie"
        )

    def _read_score(self, reply: str) -> float | Failed:
        judge, found = self.judge, _SCORE.fullmatch(_last_line(reply))
        if found is None:
            return Failed(f"the judge's reply ends in {_last_line(reply)!r:.80}, not in `Score: <number>`")
        score = float(found[1])
        if not judge.lowest <= score <= judge.highest:
            return Failed(f"the judge gave {score:g}, not {judge.lowest} to {judge.highest}")
        return (score - judge.lowest) / (judge.highest - judge.lowest)

    def _pairs(self, answers: Sequence[Answered]) -> list[tuple[Answered, str, str]]:
        """What is compared: each answer with its reference, or with the next one to the same prompt."""
        if self.judge.mode == "reference":
            for answer in answers:
                if answer.reference is None:
                    raise DataError(f"reward.judge.mode=reference needs reference answers; row {answer.row} has none")
            return [(one, one.completion, one.reference or "") for one in answers]
        pairs = []
        for ring in _rings(answers):
            if len(ring) < 2:
                raise ConfigError("reward.judge.mode=group needs two or more answers to each prompt")
            pairs += [
                (answers[place], answers[place].completion, answers[ring[(number + 1) % len(ring)]].completion)
                for number, place in enumerate(ring)
            ]
        return pairs


def conversation(prompt: str) -> str:
    """A prompt as the model saw it, without control tokens: `[User]`, `[Assistant]` and what they said."""
    parts = _TURN.split(prompt)
    if len(parts) < 3:
        return f"[User]\n{prompt}"
    names = {"user": "[User]", "model": "[Assistant]"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    said = [(names[who], text.strip().removesuffix("<end_of_turn>").strip()) for who, text in turns]
    return "\n\n".join(f"{who}\n{text}" for who, text in said if text)


def _reference(answer: Answered) -> str:
    return f"\n\n[A right answer]\n{answer.reference}" if answer.reference is not None else ""


def _last_line(reply: str) -> str:
    lines = reply.strip().lower().splitlines()
    return lines[-1].strip(" *_`#")[:200] if lines else ""


def _read_better(reply: str) -> float | Failed:
    """1 for A, 0 for B, 0.5 for a tie."""
    found = _BETTER.fullmatch(_last_line(reply))
    if found is None:
        return Failed(f"the judge's reply ends in {_last_line(reply)!r:.80}, not in `Better: A`, `B` or `tie`")
    return {"a": 1.0, "b": 0.0, "tie": 0.5}[found[1]]


def _agreed(forth: float | Failed, back: float | Failed) -> float | Failed:
    """The first answer's result from both orders; a tie where they contradict each other."""
    if isinstance(forth, Failed) or isinstance(back, Failed):
        return forth if isinstance(forth, Failed) else back
    return forth if forth + back == 1 else 0.5


def _rings(answers: Sequence[Answered]) -> list[list[int]]:
    """Places of the answers to each prompt."""
    found: dict[tuple[int, str], list[int]] = {}
    for place, answer in enumerate(answers):
        found.setdefault((answer.row, answer.prompt), []).append(place)
    return list(found.values())


def _of_rings(answers: Sequence[Answered], wins: Sequence[float | Failed]) -> list[float | Failed]:
    """Each answer's mean over its two comparisons, from the results of each with the one behind it."""
    scores: list[float | Failed] = [0.0] * len(answers)
    start = 0
    for ring in _rings(answers):
        own = wins[start : start + len(ring)]
        start += len(ring)
        for number, place in enumerate(ring):
            ahead, behind = own[number], own[number - 1]
            if isinstance(ahead, Failed) or isinstance(behind, Failed):
                scores[place] = ahead if isinstance(ahead, Failed) else behind
            else:
                scores[place] = (ahead + 1 - behind) / 2
    return scores
