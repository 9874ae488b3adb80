"""Kaggle models through kagglehub: where they lie once fetched, fetching, and what its errors mean.

An unversioned handle would ask the server each time; here the newest version that is in the cache is taken, so what
was fetched once needs no network.
"""

import dataclasses
import errno
import os
from pathlib import Path

from rlhf.model.checkpoints.handles import KaggleHandle


def cache_folder(handle: KaggleHandle) -> Path:
    """Where kagglehub keeps the versions of a model."""
    root = Path(os.environ.get("KAGGLEHUB_CACHE") or Path.home() / ".cache" / "kagglehub")
    return root / "models" / handle.owner / handle.model / handle.framework / handle.variation


def cached(handle: KaggleHandle) -> tuple[Path, KaggleHandle] | None:
    """The folder of a version that is fetched whole, and its full handle."""
    folder = cache_folder(handle)
    versions = [int(path.stem) for path in folder.glob("*.complete") if path.stem.isdigit()]
    whole = [version for version in versions if (folder / str(version)).is_dir()]
    if handle.version is not None:
        whole = [version for version in whole if version == handle.version]
    if not whole:
        return None
    return folder / str(max(whole)), dataclasses.replace(handle, version=max(whole))


def fetch(handle: KaggleHandle) -> tuple[Path, KaggleHandle]:
    """Download, going on where an earlier try stopped. Raises what kagglehub raises."""
    import kagglehub

    path = Path(kagglehub.model_download(str(handle)))
    version = int(path.name) if path.name.isdigit() else handle.version
    return path, dataclasses.replace(handle, version=version)


def explain(error: Exception, handle: KaggleHandle) -> tuple[str, bool]:
    """What to do about an error of `fetch`, and whether trying again may help at once."""
    import requests
    from kagglehub.config import get_kaggle_credentials
    from kagglehub.exceptions import DataCorruptionError

    page = f"https://www.kaggle.com/models/{handle.owner}/{handle.model}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return _refused(status, page, get_kaggle_credentials() is not None), False
    if isinstance(error, DataCorruptionError):
        return "a file came damaged (checksum) and was deleted: the same command fetches it again", True
    if isinstance(error, requests.exceptions.ChunkedEncodingError | requests.exceptions.ReadTimeout):
        return "the connection was cut: the same command goes on where it stopped", True
    if isinstance(error, requests.exceptions.ConnectionError):
        return f"Kaggle can't be reached: check the network, or copy the files of {page} and give their folder", False
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"the disk with {cache_folder(handle)} is full: make room, or set KAGGLEHUB_CACHE to another place",
            False,
        )
    return f"{type(error).__name__}: {' '.join(str(error).split())}", False


def _refused(status: int, page: str, has_token: bool) -> str:
    """What an answer of the server other than 200 means; the reason that it gives itself is lost in the client."""
    if status in (401, 403) and not has_token:
        return (
            f"Kaggle refuses ({status}), and no credentials are here: make an API token at "
            "https://www.kaggle.com/settings, save it as ~/.kaggle/kaggle.json (or set KAGGLE_USERNAME, KAGGLE_KEY), "
            f"and accept the licence at {page}"
        )
    meanings = {
        401: "your API token is not accepted: make a new one at https://www.kaggle.com/settings",
        403: f"accept the licence at {page} with the account of your API token",
        404: f"there is no such model, variation or version; see {page}",
        429: "too many requests from here: wait some minutes and try again",
    }
    return f"Kaggle refuses ({status}): {meanings.get(status, 'try again later')}"
