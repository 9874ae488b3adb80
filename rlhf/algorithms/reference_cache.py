"""Reference log-probabilities on disk.

One file holds the log-probabilities of many token sequences, found again by a digest of their tokens, so that order,
batching, padding and the split into training and evaluation don't matter. It is written whole or not at all, and
checked when read: its checksum, what it was computed from, and a few rows computed again.
"""

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rlhf import processes
from rlhf.errors import CheckpointError, ConfigError, DataError

TOLERANCE = 0.02  # nats per token, on average: above the noise of bfloat16, far below another model's difference
N_CHECKED = 4  # rows computed again when a file is read


@runtime_checkable
class Scorer(Protocol):
    """What computes log-probabilities: `rlhf.algorithms.reference.LiveReference`."""

    def token_logprobs(self, batch: dict[str, Any]) -> Any: ...
    def with_params(self, params: dict[str, Any]) -> "Scorer": ...


def cache_file(folder: Path, key: Mapping[str, str]) -> Path:
    """The file for a key: another model, data set, held-out set or template gets another file."""
    text = json.dumps(dict(key), sort_keys=True)
    return folder / f"reference-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"


def digest_of(batch: Mapping[str, Any]) -> str:
    """What tells a batch from any other: a hash of its arrays."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(batch):
        array = np.ascontiguousarray(batch[name])
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def make_folder(folder: Path) -> None:
    """The folder of the files, made if missing.

    Raises:
        ConfigError: it can't be made, or is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or str(error)
        raise ConfigError(f"algorithm.reference.cache_dir={folder} can't be used as a folder: {reason}") from error


def _sequences(batch: dict[str, Any]) -> Iterator[tuple[Any, np.ndarray, int]]:
    """(index, where it has tokens, digest of its tokens and images) of each sequence of [..., time] arrays."""
    tokens, segments = np.asarray(batch["tokens"]), np.asarray(batch["segments"])
    for index in np.ndindex(tokens.shape[:-1]):
        is_token = segments[index] > 0
        content = np.stack([tokens[index][is_token], segments[index][is_token]]).astype("<i4")
        digest = hashlib.blake2b(content.tobytes(), digest_size=8)
        if "images" in batch and (soft := np.asarray(batch["soft_tokens"])[index]).any():
            digest.update(soft[is_token].astype("<i4").tobytes() + np.asarray(batch["images"])[index[0]].tobytes())
        yield index, is_token, int.from_bytes(digest.digest(), "little")


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in ("digests", "lengths", "logprobs"):
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def precompute(reference: Scorer, batches: Iterable[dict[str, Any]], path: Path, key: Mapping[str, str]) -> None:
    """Score every sequence of `batches` once and write the file `path`, whole or not at all; its folder is there."""
    found: dict[int, np.ndarray] = {}
    for batch in batches:
        logprobs = np.asarray(reference.token_logprobs(batch), np.float32)
        found.update((digest, logprobs[index][is_token]) for index, is_token, digest in _sequences(batch))
    arrays: dict[str, np.ndarray] = {
        "digests": np.fromiter(found, np.uint64, len(found)),
        "lengths": np.fromiter(map(len, found.values()), np.int32, len(found)),
        "logprobs": np.concatenate(list(found.values()) or [np.zeros(0, np.float32)]),
    }
    if not processes.is_first():
        return
    header = json.dumps({"key": dict(key), "checksum": _checksum(arrays)}).encode()
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with unfinished.open("wb") as file:
        np.savez(file, header=np.frombuffer(header, np.uint8), **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        header = json.loads(bytes(arrays.pop("header")))
        is_whole = _checksum(arrays) == header["checksum"]
    except FileNotFoundError:
        raise CheckpointError(f"no reference log-probabilities at {path}") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it and it will be computed again") from error
    if not is_whole:
        raise CheckpointError(f"{path} is damaged (checksum mismatch); delete it and it will be computed again")
    return header, arrays


@dataclasses.dataclass(frozen=True)
class CachedReference:
    """Log-probabilities read from a file, in place of a model.

    path: the file, for messages.
    spans: (start, end) in `logprobs` of each sequence, by the digest of its tokens.
    scorer: scores with other weights where an algorithm asks for it (`with_params`).
    """

    path: Path
    spans: Mapping[int, tuple[int, int]]
    logprobs: np.ndarray
    scorer: Scorer

    @classmethod
    def load(cls, path: Path, key: Mapping[str, str], scorer: Scorer, sample: dict[str, Any]) -> "CachedReference":
        """Read a file and check it.

        scorer: has the reference's weights; they are let go after the check.
        sample: a batch whose first rows are computed again.

        Raises:
            CheckpointError: the file is missing, damaged, of another model, data set or template, or its numbers are
                not the ones that `scorer` gives.
        """
        header, arrays = _read(path)
        different = sorted(name for name in {*header["key"], *key} if header["key"].get(name) != key.get(name))
        if different:
            told = "; ".join(f"{n}: {header['key'].get(n)!r} there, {key.get(n)!r} here" for n in different)
            raise CheckpointError(f"{path} was computed from something else ({told})")
        ends = np.cumsum(arrays["lengths"])
        spans = zip((ends - arrays["lengths"]).tolist(), ends.tolist(), strict=True)
        by_digest = dict(zip(arrays["digests"].tolist(), spans, strict=True))
        cached = cls(path, by_digest, arrays["logprobs"], scorer)
        cached._check(scorer, {name: value[:N_CHECKED] for name, value in sample.items()})
        return dataclasses.replace(cached, scorer=scorer.with_params({}))

    def _check(self, scorer: Scorer, sample: dict[str, Any]) -> None:
        stored, computed = self.token_logprobs(sample), np.asarray(scorer.token_logprobs(sample))
        n_tokens = max(int((np.asarray(sample["segments"]) > 0).sum()), 1)
        difference = float(np.abs(stored - computed).sum() / n_tokens)
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"{self.path} does not hold this reference's log-probabilities: rows computed again differ by "
                f"{difference:.3g} nats per token (at most {TOLERANCE:g} is noise); delete it"
            )

    def with_params(self, params: dict[str, Any]) -> Scorer:
        """The model itself with other weights, such as the policy's."""
        return self.scorer.with_params(params)

    def token_logprobs(self, batch: dict[str, Any]) -> np.ndarray:
        """As a model gives them: float32, the shape of `batch["tokens"]`, 0 at padding.

        Raises:
            DataError: a sequence is not in the file.
        """
        logprobs = np.zeros(np.shape(batch["tokens"]), np.float32)
        for index, is_token, digest in _sequences(batch):
            if digest not in self.spans:
                row = int(batch["row"][index[0]]) if "row" in batch else index[0]
                raise DataError(
                    f"row {row} is not among the reference log-probabilities in {self.path}: the data changed since "
                    "they were computed; delete the file and they will be computed again"
                )
            start, end = self.spans[digest]
            logprobs[index][is_token] = self.logprobs[start:end]
        return logprobs
