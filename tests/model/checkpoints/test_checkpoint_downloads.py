"""The real clients of Kaggle and the Hub against a server on this machine: what is fetched, what each failure says."""

import shutil
import time

import numpy as np
import pytest
from loopback import COMMIT, Loopback
from reference_models import load_reference
from test_checkpoint_layouts import TEXT, equal

from rlhf.errors import CheckpointError
from rlhf.model.checkpoints import hub, kaggle
from rlhf.model.checkpoints.find import find
from rlhf.model.checkpoints.handles import parse
from rlhf.model.checkpoints.stream import load
from rlhf.train.sources import locate

KAGGLE = "google/gemma-3/flax/gemma3-tiny"
HUB = "google/gemma-3-tiny"


def serve(folder, monkeypatch):
    server = Loopback(folder)
    settings = {
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "HTTP_PROXY": server.url,
        "KAGGLEHUB_CACHE": str(folder.parent / "kaggle"),
        "KAGGLE_CONFIG_DIR": str(folder.parent),
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(folder.parent / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HOME": str(folder.parent),
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN", "HF_TOKEN", "http_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder.parent / "hf" / "hub"))
    return server


@pytest.fixture
def kaggle_server(shared, tmp_path, monkeypatch):
    """A model as on Kaggle: the Orbax folder beside its tokenizer."""
    folder = tmp_path / "served"
    shutil.copytree(shared / "fixtures" / "orbax_tiny_text" / "flat_bf16", folder / "gemma3-tiny")
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    yield (server := serve(folder, monkeypatch))
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub_server(shared, tmp_path, monkeypatch):
    """A model as on the Hub, with files that are not for us."""
    folder = tmp_path / "served"
    shutil.copytree(shared / "fixtures" / "gemma3_tiny_text", folder)
    for name in ("tokenizer.model", "pytorch_model.bin", "original/model.safetensors", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).parent.chmod(0o755)
        (folder / name).write_bytes(b"x" * 100)
    yield (server := serve(folder, monkeypatch))
    server.shutdown()
    server.server_close()


def refusal(text: str, timeout_seconds: float = 20.0) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(text, timeout_seconds)
    return str(caught.value)


def test_kaggle(kaggle_server, shared, caplog):
    """Fetched once; afterwards neither the newest version nor a named one asks the server anything."""
    caplog.set_level("INFO")
    source = locate(KAGGLE)
    assert source.pinned == f"kaggle://{KAGGLE}/3"
    assert source.tokenizer is not None
    assert source.tokenizer.read_bytes() == b"a tokenizer"
    layout = shared / "fixtures" / "orbax_tiny_text" / "flat_bf16"
    assert equal(source.load(TEXT, "float32", None), load(find(layout).open(), TEXT, "float32", None))
    assert "Orbax, flat, from kaggle://" in caplog.text
    kaggle_server.asked.clear()
    for text in (KAGGLE, f"{KAGGLE}/3", source.pinned):
        again = locate(text)
        assert (again.pinned, again.digest()) == (source.pinned, source.digest())
    assert not kaggle_server.asked
    assert f"{KAGGLE}: taken from the cache as {KAGGLE}/3" in caplog.text


def test_kaggle_goes_on_where_it_was_cut(kaggle_server):
    """Within one command. The client keeps whole chunks of 1 MiB."""
    content = np.random.default_rng(0).bytes(3 * 2**20)
    kaggle_server.files["large.bin"], kaggle_server.cut["large.bin"] = content, 2**21 + 5
    locate(KAGGLE)
    assert kaggle_server.ranges["large.bin"][-1] == 2**21
    assert (kaggle.cache_folder(parse(KAGGLE)) / "3" / "large.bin").read_bytes() == content


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "no credentials are here: make an API token at https://www.kaggle.com/settings"),
        (404, "there is no such model, variation or version; see https://www.kaggle.com/models/google/gemma-3"),
        (429, "too many requests"),
        (500, "try again later"),
    ],
)
def test_kaggle_refuses(kaggle_server, status, told):
    kaggle_server.refuse = status
    message = refusal(KAGGLE)
    assert message.startswith(f"model.checkpoint={KAGGLE}: Kaggle refuses ({status})")
    assert told in message


def test_kaggle_wants_the_licence_accepted(kaggle_server, monkeypatch):
    monkeypatch.setenv("KAGGLE_USERNAME", "somebody")
    monkeypatch.setenv("KAGGLE_KEY", "secret")
    kaggle_server.refuse = 403
    message = refusal(KAGGLE)
    assert "accept the licence at https://www.kaggle.com/models/google/gemma-3 with the account of your" in message


def test_a_damaged_file_from_kaggle_is_fetched_again(kaggle_server):
    kaggle_server.spoil.add("tokenizer.model")
    assert "came damaged (checksum) and was deleted: the same command fetches it again" in refusal(KAGGLE)
    kaggle_server.spoil.clear()
    assert locate(KAGGLE).tokenizer.read_bytes() == b"a tokenizer"


@pytest.mark.parametrize("text", [KAGGLE, HUB])
def test_no_network(kaggle_server, text, monkeypatch):
    kaggle_server.shutdown()
    kaggle_server.server_close()
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    message = refusal(text)
    assert "can't be reached: check the network" in message
    assert "give their folder" in message


def test_a_server_that_says_nothing(kaggle_server):
    """The client alone would wait for ever."""
    kaggle_server.stall.add("tokenizer.model")
    kaggle_server.sends_md5 = False
    start = time.monotonic()
    message = refusal(KAGGLE, timeout_seconds=1.5)
    assert "nothing came for 1.5 s (model.download_timeout): the same command tries again" in message
    assert time.monotonic() - start < 20


def test_hub_fetches_what_is_needed(hub_server, shared, caplog):
    caplog.set_level("INFO")
    a, params, _ = load_reference(shared / "fixtures" / "gemma3_tiny_text")
    source = locate(HUB)
    assert source.pinned == f"hf://{HUB}@{COMMIT}"
    assert source.tokenizer is not None
    assert equal(source.load(a, "float32", None), params)
    assert set(hub_server.downloads()) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.model",
    }  # fmt: skip
    hub_server.asked.clear()
    for text in (HUB, f"{HUB}@main", source.pinned):
        assert locate(text).digest() == source.digest()
    assert not hub_server.asked


def test_a_damaged_file_from_the_hub_is_found_and_fetched_again(hub_server, shared):
    """Its client accepts a file of the right size."""
    a, params, _ = load_reference(shared / "fixtures" / "gemma3_tiny_text")
    hub_server.spoil.add("model.safetensors")
    assert "model.safetensors came damaged (checksum) and was deleted" in refusal(HUB)
    hub_server.spoil.clear()
    assert equal(locate(HUB).load(a, "float32", None), params)


@pytest.mark.parametrize(
    ("status", "headers", "token", "told"),
    [
        (403, {"X-Error-Code": "GatedRepo"}, None, f"licence at https://huggingface.co/{HUB} and make a token"),
        (403, {"X-Error-Code": "GatedRepo"}, "hf_x", f"accept the licence at https://huggingface.co/{HUB} with"),
        (401, {"X-Error-Code": "RepoNotFound"}, None, "no such repository; see"),
        (404, {"X-Error-Code": "RevisionNotFound"}, None, "no revision 'v2'; see"),
        (401, {}, None, "make a token at https://huggingface.co/settings/tokens"),
        (404, {}, None, "refuses (404): there is no such repository or revision; see https://huggingface.co/"),
    ],
)  # fmt: skip
def test_hub_refuses(hub_server, monkeypatch, status, headers, token, told):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub_server.refuse, hub_server.headers = status, headers
    text = f"{HUB}@v2" if "Revision" in str(headers) else HUB
    message = refusal(text)
    assert message.startswith(f"model.checkpoint={text}: ")
    assert told in message


def test_a_repository_without_parameters(hub_server):
    for name in [name for name in hub_server.files if name.endswith("safetensors")]:
        del hub_server.files[name]
    hub_server.files["model.gguf"] = b"x"
    assert "it holds no safetensors and no Orbax folder, only README.md" in refusal(HUB)


def test_full_disks():
    full = OSError(28, "No space left on device")
    handle = parse(KAGGLE)
    assert "is full: make room, or set KAGGLEHUB_CACHE" in kaggle.explain(full, handle)[0]
    wrapped = RuntimeError("download failed")
    wrapped.__cause__ = full
    assert "is full: make room, or set HF_HOME" in hub.explain(wrapped, parse(HUB))[0]


def test_shards_of_the_hub_without_an_index_are_all_needed():
    names = ["model-1.safetensors", "model-2.safetensors", "sub/model-3.safetensors", "config.json", "x.gguf"]
    assert hub.needed(names) == ["config.json", "model-1.safetensors", "model-2.safetensors"]
    assert hub.needed(["a/_METADATA", "a/d/1", "b.bin", "tokenizer.model"]) == [
        "tokenizer.model",
        "a/_METADATA",
        "a/d/1",
    ]
