"""Models of the Hugging Face Hub: where they lie once fetched, fetching only what is needed, and what errors mean.

A branch that was fetched once is taken from the cache at the commit it had then, so it needs no network.
"""

import errno
import re
from pathlib import Path

from rlhf.errors import CheckpointError
from rlhf.model.checkpoints import safetensors
from rlhf.model.checkpoints.digests import sha256
from rlhf.model.checkpoints.handles import HubHandle

_BESIDE = ("config.json", "generation_config.json", "tokenizer.model")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def cache_folder(handle: HubHandle) -> Path:
    """Where the Hub's client keeps a repository."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{handle.repository.replace('/', '--')}"


def cached(handle: HubHandle) -> tuple[Path, HubHandle] | None:
    """The folder of a commit that is fetched whole, and its full handle."""
    from rlhf.model.checkpoints.find import find  # with jax behind it, which the process that fetches does not need

    folder, revision = cache_folder(handle), handle.revision or "main"
    ref = folder / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    snapshot = folder / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return None
    try:
        files = find(snapshot).files()
    except CheckpointError:
        return None
    if not files or not (snapshot / "tokenizer.model").exists():
        return None
    return snapshot, HubHandle(handle.repository, commit)


def fetch(handle: HubHandle) -> tuple[Path, HubHandle]:
    """Download the parameters, configs and the tokenizer; no other file. Raises what the Hub's client raises."""
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(handle.repository, revision=handle.revision)
    names = [one.rfilename for one in info.siblings or []]
    # by the name of the branch, not the commit, so that the cache knows the branch afterwards
    path = snapshot_download(handle.repository, revision=handle.revision, allow_patterns=needed(names))
    return Path(path), HubHandle(handle.repository, info.sha)


def needed(names: list[str]) -> list[str]:
    """The files to fetch of a repository's.

    Raises:
        CheckpointError: none of them holds parameters in a form that is read.
    """
    weights = [name for name in names if name == safetensors.ONE] or [
        name for name in names if "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))
    ]
    folders = [name.removesuffix("_METADATA") for name in names if name.endswith("/_METADATA")]
    if not weights:
        weights = [name for name in names if name.startswith(tuple(folders))] if folders else []
    if not weights:
        raise CheckpointError(f"it holds no safetensors and no Orbax folder, only {', '.join(sorted(names)[:8])}")
    return [name for name in names if name in _BESIDE] + weights


def verify(snapshot: Path) -> None:
    """Compare each large file with the SHA-256 that is its name in the cache, once; a damaged one is deleted.

    Raises:
        CheckpointError: a file is damaged.
    """
    mark = snapshot.parent.parent / f".verified-{snapshot.name}"
    if mark.exists():
        return
    for path in sorted(snapshot.rglob("*")):
        blob = path.resolve()
        if path.is_symlink() and _SHA256.fullmatch(blob.name) and sha256(blob) != blob.name:
            path.unlink()
            blob.unlink()
            what = "came damaged (checksum) and was deleted"
            raise CheckpointError(f"{path.name} {what}: the same command fetches it again")
    mark.touch()


def explain(error: Exception, handle: HubHandle) -> tuple[str, bool]:
    """What to do about an error of `fetch`, and whether trying again may help at once."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, CheckpointError):
        return str(error), False
    if status is not None or isinstance(error, errors.HfHubHTTPError):
        return _refused(error, status, handle), False
    chain = [error, *_causes(error)]
    names = {type(one).__name__ for one in chain}
    if any(isinstance(one, OSError) and one.errno == errno.ENOSPC for one in chain):
        return f"the disk with {cache_folder(handle)} is full: make room, or set HF_HOME to another place", False
    if names & {"RemoteProtocolError", "ReadError", "ReadTimeout", "IncompleteRead"}:
        return "the connection was cut: the same command goes on with the files that are missing", True
    if names & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout"}:
        page = f"https://huggingface.co/{handle.repository}"
        hint = f"check the network and HF_HUB_OFFLINE, or copy the files of {page} and give their folder"
        return f"the Hub can't be reached: {hint}", False
    return f"{type(error).__name__}: {' '.join(str(error).split())}", False


def _refused(error: Exception, status: int | None, handle: HubHandle) -> str:
    """What an answer of the server other than 200 means."""
    from huggingface_hub import errors, get_token

    page = f"https://huggingface.co/{handle.repository}"
    log_in = "make a token at https://huggingface.co/settings/tokens and give it by `hf auth login` or as HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError
        who = "with the account of your token" if get_token() else f"and {log_in}"
        return f"the Hub refuses: accept the licence at {page} {who}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hub has no such repository; see {page}" + ("" if get_token() else f"; if it is private, {log_in}")
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {handle.revision!r}; see {page}/tree/main"
    meanings = {
        401: log_in,
        403: log_in,
        404: f"there is no such repository or revision; see {page}",
        429: "too many requests from here: wait some minutes and try again",
    }
    return f"the Hub refuses ({status}): {meanings.get(status or 0, 'try again later')}"


def _causes(error: BaseException) -> list[BaseException]:
    cause = error.__cause__ or error.__context__
    return [] if cause is None else [cause, *_causes(cause)]
