"""A judge against a loopback server that fails in every way, and one of our own checkpoints' form."""

import http.server
import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf.errors import ConfigError, DataError, TrainingError
from rlhf.rewards.base import Answered
from rlhf.rewards.judge import Judge, conversation
from rlhf.rewards.weighted import Rewards


class Server:
    """An OpenAI-compatible server. reply: what it says to a text; a number is a status, an exception a lost
    connection, None silence."""

    def __init__(self):
        self.reply = lambda text: "Score: 5"
        self.asked, self.keys = [], []
        self.open = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][0]["content"]
                assert (self.path, body["model"], body["temperature"]) == ("/v1/chat/completions", "judge", 0)
                outer.asked.append(text)
                outer.keys.append(self.headers.get("Authorization"))
                self.answer(outer.reply(text))

            def answer(self, reply):
                if reply is None:
                    outer.open.wait(10)
                    return
                status = reply if isinstance(reply, int) else 200
                body = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
                if isinstance(reply, bytes):
                    body = reply
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.open.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Server()
    yield made
    made.close()


def answered(*texts, reference="good", row=None):
    prompt = "<bos><start_of_turn>user\nWhat?<end_of_turn>\n<start_of_turn>model\n"
    return [
        Answered(prompt, text, reference, {}, 3, False, row=n if row is None else row) for n, text in enumerate(texts)
    ]


def judge(server, **settings):
    defaults = {"endpoint": server.url, "model": "judge", "cache": None, "retries": 1, "request_seconds": 0.5}
    reward = Judge(**{**defaults, "timeout_seconds": 2.0, **settings})
    return Rewards({"judge": reward}).connected(lambda checkpoint: None)


def test_scores_are_read_strictly(server):
    replies = {
        "a": "It is fine.\nScore: 10",
        "b": "**Score: 1**",
        "c": "score: 5.5/10",
        "d": "Score: 8 or maybe 9",
        "e": "Score: 11",
        "f": "I like it",
        "g": "",
    }
    server.reply = lambda text: replies[text.split("[Answer]\n")[1][0]]
    scores = judge(server)(answered(*replies), 0)
    np.testing.assert_allclose(scores.total, [1.0, 0.0, 0.5, 0, 0, 0, 0])
    assert scores.is_valid.tolist() == [True] * 3 + [False] * 4
    assert scores.metrics["rewards/judge/unparsable"] == pytest.approx(4 / 7)
    assert scores.metrics["rewards/judge/errors"] == 4
    assert "[User]\nWhat?\n\n[A right answer]\ngood\n\n[Answer]\n" in server.asked[0]
    assert server.keys[0] is None


def test_a_failing_server_is_asked_again(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    monkeypatch.setattr("rlhf.rewards.endpoint._FIRST_WAIT", 0.01)
    faults = iter([500, b"{not json", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', None, 429])
    server.reply = lambda text: next(faults, "Score: 10")
    scores = judge(server, retries=6, timeout_seconds=30.0, key_variable="MY_KEY")(answered("a"), 0)
    assert scores.total == [1.0]
    assert len(server.asked) == 7
    assert set(server.keys) == {"Bearer secret"}


def test_one_silent_answer_is_masked_and_in_time(server):
    server.reply = lambda text: None if "slow" in text else "Score: 10"
    started = time.monotonic()
    scores = judge(server, timeout_seconds=1.2)(answered("a", "slow", "b"), 0)
    assert time.monotonic() - started < 2.2
    assert scores.is_valid.tolist() == [True, False, True]
    with pytest.raises(TrainingError, match=r"reward judge failed on row 1 'slow': .*no reply within"):
        judge(server, on_error="stop")(answered("a", "slow"), 0)


def test_a_server_that_never_answers_stops_the_run(server):
    server.reply = lambda text: 503
    with pytest.raises(TrainingError, match=r"none of 2 questions was answered: .*status 503"):
        judge(server, retries=0)(answered("a", "b"), 0)
    gone = Judge(endpoint="http://127.0.0.1:9/v1", model="judge", cache=None, retries=0)
    with pytest.raises(TrainingError, match="ConnectionRefusedError"):
        gone(answered("a"), 0)


def test_a_refusal_is_told_at_once(server):
    server.reply = lambda text: 401
    with pytest.raises(ConfigError, match=r"reward\.judge\.endpoint=.*: status 401"):
        judge(server)(answered("a"), 0)
    assert len(server.asked) == 1


def test_replies_are_kept_on_disk(server, tmp_path):
    path = tmp_path / "deep" / "judge.jsonl"
    settings = {"cache": str(path)}
    first = judge(server, **settings)(answered("a", "b", "a", row=1), 0)
    assert len(server.asked) == 2  # equal questions are asked once
    with path.open("a") as file:
        file.write('{"key": "torn')
    again = judge(server, **settings)(answered("a", "b", "c", row=1), 0)
    assert len(server.asked) == 3
    np.testing.assert_array_equal(first.total[:2], again.total[:2])
    judge(server, **settings)(answered("c", row=1), 0)
    judge(server, **settings, rubric="Is it polite?")(answered("c"), 0)
    assert len(server.asked) == 4


def preferring(text):
    """Prefers `best`, then whatever comes first: the order matters there."""
    first, second = text.split("[Answer A]\n")[1].split("\n[End of answer A]\n\n[Answer B]\n")
    return "Better: B" if second.startswith("best") and first != "best" else "Better: A"


def test_against_the_reference_in_both_orders(server):
    server.reply = preferring
    scores = judge(server, mode="reference")(answered("best", "other"), 0)
    np.testing.assert_array_equal(scores.total, [1.0, 0.5])  # `other` and `good`: the first, whichever it is
    assert scores.metrics["rewards/judge/order_dependent"] == 0.5
    assert len(server.asked) == 4
    with pytest.raises(DataError, match="needs reference answers; row 0 has none"):
        judge(server, mode="reference")(answered("a", reference=None), 0)


def test_within_a_group(server):
    """x ties with y, loses against best; y loses against best too: 1/4, 1/4 and 1 of each ring of three."""
    server.reply = preferring
    scores = judge(server, mode="group")(answered("x", "y", "best", row=3), 0)
    np.testing.assert_array_equal(scores.total, [0.25, 0.25, 1.0])
    server.reply = lambda text: "no idea" if text.count("y\n") else preferring(text)
    masked = judge(server, mode="group")(answered("x", "y", "best", row=3), 0)
    assert masked.is_valid.tolist() == [False, False, False]  # y is in two of three comparisons
    with pytest.raises(ConfigError, match="needs two or more answers to each prompt"):
        judge(server, mode="group")(answered("x", "y"), 0)


def test_a_checkpoint_judges():
    def load(checkpoint):
        assert checkpoint == "outputs/judge"
        return SimpleNamespace(
            identity="abc", answer=lambda texts, n: ["Score: 10" if "yes" in t else "hm" for t in texts]
        )

    reward = Judge(checkpoint="outputs/judge", cache=None, rubric="Is it so?")
    scores = Rewards({"judge": reward}).connected(load)(answered("yes", "no"), 0)
    assert scores.is_valid.tolist() == [True, False]
    assert scores.total[0] == 1.0


def test_a_conversation_is_shown_without_control_tokens():
    prompt = (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert conversation(prompt) == "[User]\nBe brief.\n\nHi\n\n[Assistant]\nHello\n\n[User]\nWho?"
    assert conversation("plain") == "[User]\nplain"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs checkpoint=… or endpoint=…"),
        ({"checkpoint": "a", "endpoint": "http://b"}, "one of them"),
        ({"endpoint": "http://b"}, "model of Judge is missing"),
        ({"endpoint": "b", "model": "c"}, "endpoint=b of Judge must begin with http"),
        ({"checkpoint": "a", "lowest": 3, "highest": 3}, "lowest=3 of Judge must be less than highest=3"),
        ({"checkpoint": "a", "parallel": 0}, "parallel=0 of Judge must be at least 1"),
    ],
)
def test_impossible_judges_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Judge(**settings)
