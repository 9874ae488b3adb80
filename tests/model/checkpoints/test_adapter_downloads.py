"""Adapters of the Hub, fetched by its real client from a server on this machine."""

from pathlib import Path

import pytest
from loopback import COMMIT, Loopback

from rlhf.errors import CheckpointError, ConfigError
from rlhf.model.peft import CONFIG, WEIGHTS, read_settings
from rlhf.train.adapters import fetch_adapter

FOLDER = Path(__file__).resolve().parents[2] / "fixtures" / "peft" / "all"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A repository with the adapter and a file that is not for us."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((FOLDER / name).read_bytes())
    (folder / "training_args.bin").write_bytes(b"x")
    served = Loopback(folder)
    for name, value in {"ENDPOINT": served.url, "HF_HUB_CACHE": str(tmp_path / "hub")}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    yield served
    served.shutdown()
    served.server_close()


def test_the_two_files_are_fetched(server):
    folder = fetch_adapter("someone/adapter")
    assert folder.name == COMMIT
    assert read_settings(folder).rank == 2
    assert set(server.downloads()) == {CONFIG, WEIGHTS}


def test_a_damaged_file_is_found(server):
    server.spoil.add(WEIGHTS)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} came damaged"):
        fetch_adapter("someone/adapter")


def test_refusals_say_why(server):
    server.refuse, server.headers = 404, {"X-Error-Code": "RepoNotFound"}
    with pytest.raises(CheckpointError, match=r"model\.adapter=someone/adapter: the Hub has no such repository"):
        fetch_adapter("someone/adapter")
    with pytest.raises(ConfigError, match=r"model\.adapter=no/where/at/all: there is no such folder"):
        fetch_adapter("no/where/at/all")
