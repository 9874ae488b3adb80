"""Advantages, truncation and token choice against numbers worked out by hand."""

import numpy as np
import pytest

from rlhf.errors import ConfigError
from rlhf.ops.advantages import (
    BatchScaled,
    BatchWhitened,
    GroupCentred,
    GroupNormalised,
    LeaveOneOut,
    Plain,
    spread,
    whiten,
)
from rlhf.ops.token_choice import HighEntropy
from rlhf.ops.truncation import KeepTruncated, MaskTruncated, PenaliseTruncated, SoftOverlong

REWARDS = np.array([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1], [3.0, 1.0, 2.0, 0.0]])
VALID = np.ones((3, 4), bool)
ALL = [GroupNormalised(), GroupCentred(), BatchScaled(), LeaveOneOut(), LeaveOneOut(whitened=True)]


def test_by_hand():
    np.testing.assert_allclose(GroupCentred()(REWARDS, VALID)[0], [0.75, -0.25, -0.25, -0.25])
    normalised = GroupNormalised()(REWARDS, VALID)
    np.testing.assert_allclose(normalised[0], np.array([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(normalised[2], np.array([1.5, -0.5, 0.5, -1.5]) / (1.6666667**0.5 + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(LeaveOneOut()(REWARDS, VALID)[2], [3 - 1, 1 - 5 / 3, 2 - 4 / 3, 0 - 2], rtol=1e-6)
    np.testing.assert_array_equal(Plain()(REWARDS, VALID), REWARDS.astype(np.float32))
    scaled = BatchScaled(epsilon=0.0)(REWARDS, VALID)
    np.testing.assert_allclose(scaled[0, 0], 0.75 / REWARDS.std(ddof=1), rtol=1e-6)


@pytest.mark.parametrize("advantage", ALL, ids=repr)
def test_equal_rewards_have_none_and_nothing_is_divided_by_zero(advantage):
    with np.errstate(all="raise"):
        assert not advantage(REWARDS, VALID)[1].any()
        assert not advantage(np.full((3, 4), 0.1), VALID).any()
        assert not GroupNormalised(epsilon=0.0)(REWARDS, VALID)[1].any()


@pytest.mark.parametrize("advantage", ALL, ids=repr)
def test_whole_numbers_are_not_cut(advantage):
    rewards = np.array([[1, 0, 0, 0], [2, 0, 1, 1], [5, 1, 2, 3]])
    np.testing.assert_array_equal(advantage(rewards, VALID), advantage(rewards.astype(float), VALID))


@pytest.mark.parametrize("advantage", ALL, ids=repr)
def test_what_could_not_be_judged_is_as_if_it_were_not_there(advantage):
    is_valid = VALID.copy()
    is_valid[0, 3] = is_valid[1, 1] = False
    odd = np.where(is_valid, REWARDS, 1e9)
    found = advantage(odd, is_valid)
    assert not found[~is_valid].any()
    np.testing.assert_array_equal(found, advantage(np.where(is_valid, REWARDS, -7.0), is_valid))
    lone = is_valid & np.array([True, False, False, False])
    assert not advantage(REWARDS, lone).any()
    assert spread(REWARDS, is_valid).tolist() == [1, 0, 3]
    assert not spread(REWARDS, lone).any()


def test_whitening_is_over_what_counts():
    values, counted = (
        np.array([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]]),
        np.array([[True, True, False], [True, False, False]]),
    )
    np.testing.assert_allclose(whiten(values, counted, 0.0), [[-1, 0, 0], [1, 0, 0]])
    assert not whiten(np.ones((2, 3)), counted, 0.0).any()
    assert not whiten(values, np.zeros((2, 3), bool), 0.0).any()
    centred = BatchWhitened(centred=True)
    np.testing.assert_allclose(centred(REWARDS, VALID)[0], [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(centred.over_tokens(values.astype(np.float32), counted)[0, 0], -1, rtol=1e-6)
    assert (centred.needs_group, BatchWhitened().needs_group) == (True, False)


def test_rewards_of_long_and_cut_answers():
    rewards, n_tokens = np.ones(5, np.float32), np.array([10, 60, 80, 100, 100])
    is_cut = np.array([False, False, False, False, True])
    shaped = SoftOverlong(buffer=40, penalty=0.5).shaped(rewards, n_tokens, is_cut, 100)
    np.testing.assert_allclose(shaped, [1, 1, 0.75, 0.5, 0.5])
    early = SoftOverlong(buffer=40).shaped(rewards, np.full(5, 10), is_cut, 100)  # cut by something else
    np.testing.assert_allclose(early, [1, 1, 1, 1, 0])
    np.testing.assert_allclose(PenaliseTruncated(penalty=2.0).shaped(rewards, n_tokens, is_cut, 100), [1, 1, 1, 1, -1])
    assert MaskTruncated().is_kept(is_cut).tolist() == [True, True, True, True, False]
    assert KeepTruncated().is_kept(is_cut).all()
    with pytest.raises(ConfigError, match=r"truncation.buffer=40 must be at most algorithm.max_new_tokens=32"):
        SoftOverlong(buffer=40).require_fits(32)


def test_the_tokens_of_highest_entropy():
    is_answer = np.array([[False, True, True, True], [False, True, True, False]])
    entropy = np.array([[9.0, 0.1, 0.5, 0.2], [9.0, 0.4, 0.3, 9.0]])
    np.testing.assert_array_equal(HighEntropy(share=0.4)(is_answer, entropy), [[0, 0, 1, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(HighEntropy(share=1.0)(is_answer, entropy), is_answer)
    assert not HighEntropy()(np.zeros((2, 4), bool), entropy).any()
