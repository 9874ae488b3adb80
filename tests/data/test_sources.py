"""Finding files, and reading parquet and sets on the hub."""

import json
import os
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from rlhf.data.sources import find_files, read_files, read_hub
from rlhf.errors import DataError


@pytest.fixture
def folder(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "train-extra.json", "trainer.jsonl", "notes.txt"):
        (tmp_path / name).write_text(json.dumps({"file": name}) + "\n")
    (tmp_path / "parts" / "data").mkdir(parents=True)
    for name in ("train-00001-of-00002.jsonl", "train-00000-of-00002.jsonl", "validation.jsonl"):
        (tmp_path / "parts" / "data" / name).write_text("{}\n")
    (tmp_path / "deep" / "train").mkdir(parents=True)
    (tmp_path / "deep" / "train" / "x.jsonl.gz").write_bytes(b"")
    return tmp_path


def names(found: tuple[Path, ...]) -> list[str]:
    return [path.name for path in found]


def test_a_folder_has_files_named_after_the_split(folder):
    assert names(find_files(str(folder), "train")) == ["train-extra.json", "train.jsonl"]
    assert names(find_files(str(folder), "test")) == ["test.jsonl"]
    shards = ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert names(find_files(str(folder / "parts"), "train")) == shards
    assert names(find_files(str(folder / "deep"), "train")) == ["x.jsonl.gz"]


def test_files_patterns_and_lists(folder):
    assert names(find_files(str(folder / "test.jsonl"), "train")) == ["test.jsonl"]
    assert names(find_files(str(folder / "t*.jsonl"), "train")) == ["test.jsonl", "train.jsonl", "trainer.jsonl"]
    pair = (str(folder / "train.jsonl"), str(folder / "test.jsonl"))
    assert names(find_files(pair, "train")) == ["train.jsonl", "test.jsonl"]
    assert [row.place for row in read_files(find_files(pair, "train"))] == [f"{path}:1" for path in pair]


@pytest.mark.parametrize(
    ("path", "split", "reason"),
    [
        ("train.josnl", "train", r"there is no such file or folder; did you mean 'train.jsonl'\?"),
        ("nowhere/train.jsonl", "train", r"there is no such file or folder \(nor the folder .*nowhere\)"),
        ("notes.txt", "train", r"can't read this kind of file; known are \.jsonl, \.json"),
        ("x*.jsonl", "train", r"no \.jsonl, .* file matches"),
        ("", "tset", r"has no data files of split 'tset' \(there are: .*\); did you mean 'test'\?"),
    ],
)
def test_what_is_not_there(folder, path, split, reason):
    with pytest.raises(DataError, match=f"dataset.path=.*{reason}"):
        find_files(str(folder / path), split)


def test_lists_without_sense(folder):
    with pytest.raises(DataError, match=r"dataset.path is an empty list"):
        find_files((), "train")
    with pytest.raises(DataError, match=r"dataset.path names .*test\.jsonl twice"):
        find_files((str(folder / "test.jsonl"), str(folder / "t*.jsonl")), "train")


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as reading a set of two jsonl files takes."""

    files: ClassVar = {
        "train.jsonl": b'{"question": "1+1?", "answer": "#### 2"}\n{"question": "1+2?", "answer": "#### 3"}\n',
        "test.jsonl": b'{"question": "2+2?", "answer": "#### 4"}\n',
    }
    commit = "0" * 39 + "1"

    def _answer(self, with_body: bool):
        path = self.path.split("?")[0]
        if path.startswith("/api/datasets/someone/sums"):
            self._api(path, with_body)
        elif path.startswith("/datasets/someone/sums/resolve/"):
            data = self.files.get(path.split("/")[-1])
            if data is None:
                self._send(b"", "text/plain", with_body, 404, "EntryNotFound")
            else:
                self._send(data, "application/octet-stream", with_body)
        else:
            self._send(b'{"error": "Repository not found"}', "application/json", with_body, 404, "RepoNotFound")

    def _api(self, path: str, with_body: bool):
        tree = [
            {"type": "file", "path": name, "size": len(data), "oid": f"{number:040d}"}
            for number, (name, data) in enumerate(self.files.items())
        ]
        info = {
            "id": "someone/sums",
            "sha": self.commit,
            "tags": [],
            "siblings": [{"rfilename": n} for n in self.files],
        }
        if "/tree/" in path:
            body: object = tree
        elif "/paths-info/" in path:
            size = int(self.headers.get("Content-Length", 0))
            asked = self.rfile.read(size).decode()
            body = [entry for entry in tree if str(entry["path"]) in asked]
        else:
            body = info
        self._send(json.dumps(body).encode(), "application/json", with_body)

    def _send(self, data: bytes, kind: str, with_body: bool, status: int = 200, error: str | None = None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hash(data) & 0xFFFFFFFF:040d}"')
        self.send_header("X-Repo-Commit", self.commit)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def do_GET(self):
        self._answer(True)

    def do_POST(self):
        self._answer(True)

    def do_HEAD(self):
        self._answer(False)

    def log_message(self, *args):
        pass


CODE = """
import json, sys
from pathlib import Path
from typing import ClassVar

import pyarrow, pyarrow.parquet
from rlhf.data.dataset import Table
from rlhf.data.rows import Questions
from rlhf.data.sources import read_files
from rlhf.errors import DataError

def problem(read, *args):
    try:
        list(read(*args))
    except DataError as error:
        return str(error)

def table(hub="someone/sums", **settings):
    rows = Questions(answer="answer", answer_pattern="#### (.*)")
    return Table(rows=rows, hub=hub, max_length=64, **settings)

folder = Path(sys.argv[1])
messages = [[dict(role="user", content="q"), dict(role="assistant", content=f"a{i}")] for i in range(3)]
pyarrow.parquet.write_table(pyarrow.table(dict(messages=messages, n=[1.5, None, 2.0])), folder / "train.parquet")
(folder / "bad.parquet").write_bytes(b"PAR1 nothing")
print(json.dumps(dict(
    parquet=[(row.place, row.fields) for row in read_files((folder / "train.parquet",))],
    bad=problem(read_files, (folder / "bad.parquet",)),
    train=[(source.place, example.reference) for source, example in table().examples("train", "prompt")],
    held_out=[table(holdout=0.5).held_out(), table(holdout=0.5, eval_split="dev").held_out()],
    split=problem(table(eval_split="tset").examples, "eval", "prompt"),
    name=problem(table(hub="someone/nothing").examples, "eval", "prompt"),
)))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `datasets` gives, in a process of its own: it reads its settings, and warns, when it is imported."""
    folder = tmp_path_factory.mktemp("own_process")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(folder / "cache")}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", CODE, str(folder)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=240)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "folder": folder}


def test_parquet(found):
    assert len(found["parquet"]) == 3
    assert found["parquet"][1] == [
        f"{found['folder']}/train.parquet row 1",
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a1"}], "n": None},
    ]
    assert found["bad"].startswith(f"{found['folder']}/bad.parquet can't be read as parquet: ")


def test_a_set_on_the_hub(found):
    assert found["train"] == [["someone/sums train row 0", "2"], ["someone/sums train row 1", "3"]]
    assert found["held_out"] == [0.0, 0.5]  # the set has a split `test`, but none named `dev`
    assert found["split"] == (
        "dataset.hub=someone/sums: Unknown split \"tset\". Should be one of ['train', 'test']; did you mean 'test'?"
    )
    assert found["name"].startswith("dataset.hub=someone/nothing: no such set, or it is gated and there is no access")


def test_no_connection(monkeypatch):
    class NotFoundError(Exception):
        pass

    def load_dataset(*args, **settings):
        raise OSError("no route to host")

    exceptions = types.SimpleNamespace(DatasetNotFoundError=NotFoundError)
    library = types.SimpleNamespace(load_dataset=load_dataset, exceptions=exceptions)
    monkeypatch.setitem(sys.modules, "datasets", library)
    reason = (
        "dataset.hub=a/b, dataset.hub_subset=main can't be read: OSError: no route to host; "
        "dataset.path=FOLDER reads local files instead"
    )
    with pytest.raises(DataError, match=reason):
        next(read_hub("a/b", "main", None, "train"))
