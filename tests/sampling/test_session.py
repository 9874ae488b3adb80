"""Conversations: what was said before is not run again, and changes nothing; text comes in whole characters."""

import jax
import numpy as np
import pytest
from reference_vision import load_torch_form
from test_components import NEVER, image_prompts
from test_generate import KEY, prompts_of, recompute, run, small  # noqa: F401

from rlhf.model.gemma3 import Gemma3
from rlhf.model.tokenizer import Tokenizer
from rlhf.sampling.generate import Generation
from rlhf.sampling.methods import Greedy, Sample
from rlhf.sampling.session import Session
from rlhf.sampling.stops import TextStream
from rlhf.train import guard


def begin(small, **settings):  # noqa: F811
    defaults = {"method": Sample(temperature=0.8), "key": KEY, "stop_ids": (), "max_new_tokens": 20, "room": 192}
    return Session(*small, **{**defaults, **settings})


def trainers(model, params, tokens, n_answer, temperature):
    """The trainer's log-probabilities of the last n_answer tokens of a conversation, run whole."""
    ids, n = np.array([tokens[-n_answer:]]), np.array([n_answer])
    nothing = np.zeros((1, n_answer), np.float32)
    generation = Generation(ids, nothing, nothing, None, None, n, ["length"])
    return recompute(model, params, [tokens[:-n_answer]], generation, temperature)[0]


def test_turns_are_added_to_what_is_kept(small):  # noqa: F811
    """Four turns far past the window of 5: each runs its own tokens only, and compiles nothing."""
    session, conversation = begin(small), []
    for turn, n in enumerate((7, 3, 33, 1)):
        new = prompts_of((n,), seed=turn)[0]
        n_before = max(len(conversation) - 1, 0)
        with guard.record_compilations() as recording:
            drawn = list(session.answer([*conversation, *new]))
        assert turn == 0 or len(recording) == 0, recording
        assert session.n_run == len(conversation) + n - 1 - n_before
        conversation = session.tokens
        assert conversation[-20:] == [token.id for token in drawn]
        expected = trainers(*small, conversation, 20, 0.8)
        np.testing.assert_allclose([token.logprob for token in drawn], expected, atol=1e-4)


def test_interrupted_and_rewritten_conversations(small):  # noqa: F811
    session = begin(small)
    first = prompts_of((6,))[0]
    some = session.answer(first, every=3)
    given = [next(some) for _ in range(8)]  # of nine that are drawn
    some.close()
    assert session.tokens == first + [token.id for token in given]
    second = [*session.tokens, 5, 9, 11]
    drawn = list(session.answer(second))
    np.testing.assert_allclose([t.logprob for t in drawn], trainers(*small, session.tokens, 20, 0.8), atol=1e-4)
    other = [first[0] + 1, *session.tokens[1:30]]
    drawn = list(session.answer(other))  # another past
    assert session.n_run == 29
    np.testing.assert_allclose([t.logprob for t in drawn], trainers(*small, session.tokens, 20, 0.8), atol=1e-4)


def test_a_conversation_that_outgrows_its_room_gets_more(small):  # noqa: F811
    session = begin(small, room=96)
    list(session.answer(prompts_of((40,))[0]))
    assert session.shape.prompt_tokens == 96
    drawn = list(session.answer([*session.tokens, *prompts_of((30,), seed=1)[0]]))
    assert session.shape.prompt_tokens == 192  # the programs of the tests above
    np.testing.assert_allclose([t.logprob for t in drawn], trainers(*small, session.tokens, 20, 0.8), atol=1e-4)


def test_images_are_kept_like_words(shared):
    """The answer to an image and the turn after it equal the reference's own continuation."""
    a, params, expected = load_torch_form(shared / "fixtures" / "gemma3_tiny_mm")
    prompts, pictures = image_prompts(expected)
    session = Session(
        Gemma3(a), params, method=Greedy(), key=KEY, stop_ids=(), max_new_tokens=6, forbidden_ids=NEVER, room=96
    )
    prompt, images, greedy = prompts[0], pictures[0], expected["greedy"][0].tolist()
    assert [token.id for token in session.answer(prompt, images)] == greedy[:6]
    assert session.n_run == len(prompt) - 1
    # the answer so far as the beginning of the next turn: its continuation is the reference's
    assert [token.id for token in session.answer(session.tokens, images)] == greedy[6:12]
    assert session.n_run == 0


TEXTS = ["Zażółć gęślą jaźń — 42 €", "family: 👨‍👩‍👧‍👦!", "plain words, then a stop", "日本語\nと改行", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_together_the_text(text):
    tokenizer = Tokenizer()
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert "".join([*pieces, stream.end()]) == tokenizer.decode(ids) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_stop_text_is_never_shown():
    tokenizer = Tokenizer()
    ids = tokenizer.encode("one two END three")
    stream, shown = TextStream(tokenizer, ["END", "tree"]), ""
    for token in ids:
        shown += stream.add(token)
        assert not shown.endswith("E")
        if stream.is_stopped:
            break
    assert shown + stream.end() == stream.text == "one two "
    again = TextStream(tokenizer, ["END"])
    assert "".join([*map(again.add, tokenizer.encode("THE EN")), again.end()]) == "THE EN"  # the head of a stop is text


def test_broken_bytes_are_shown_at_the_end():
    tokenizer = Tokenizer()
    broken = tokenizer.encode("€")[:-1]
    stream = TextStream(tokenizer)
    assert [stream.add(token) for token in broken] == [""] * len(broken)
    assert stream.end() == tokenizer.decode(broken)


def test_session_arrays_are_released_with_it(small):  # noqa: F811
    before = sum(x.nbytes for x in jax.live_arrays())
    session = begin(small)
    list(session.answer([3, 4, 5]))
    assert sum(x.nbytes for x in jax.live_arrays()) > before
    del session
    assert sum(x.nbytes for x in jax.live_arrays()) <= before
