"""Checksums of files."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_N_THREADS = 4  # hashing releases the interpreter lock


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def of_files(paths: list[Path], root: Path) -> str:
    """One digest of the names (below `root`) and contents of files."""
    with ThreadPoolExecutor(_N_THREADS) as pool:
        sums = sorted(
            f"{path.relative_to(root).as_posix()} {one}"
            for path, one in zip(paths, pool.map(sha256, paths), strict=True)
        )
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()
