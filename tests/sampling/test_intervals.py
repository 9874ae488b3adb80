"""Intervals, tests and estimators against numbers worked out by hand, and their coverage."""

import itertools
import json
import math

import numpy as np
import pytest

from rlhf.errors import DataError
from rlhf.sampling.intervals import (
    bootstrap,
    interval,
    interval_of_paired_difference,
    interval_of_shares,
    majority_share,
    mcnemar,
    pass_at_k,
    sign_flips,
)
from rlhf.sampling.paired import compare_means, pairs_by_prompt, verdict, win_rate


def test_pass_at_k_is_the_mean_over_all_choices():
    """Chen et al., 2021, eq. 1: of 5 answers 2 are right; every choice of k of them."""
    right = [True, True, False, False, False]
    for k in range(1, 6):
        by_hand = np.mean([any(chosen) for chosen in itertools.combinations(right, k)])
        assert pass_at_k(5, 2, k) == pytest.approx(by_hand)
    assert pass_at_k(5, 0, 5) == 0.0
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)


def test_the_majority_by_hand():
    def share(answers, right):
        return majority_share(answers, [a in right for a in answers], lambda a, b: float(a) == float(b))

    assert share(["4", "4.0", "5"], ["4", "4.0"]) == 1.0
    assert share(["5", "5", "4", None], ["4"]) == 0.0
    assert share(["5", "4"], ["4"]) == 0.5  # equally frequent
    assert share([None, None], []) == 0.0


def test_mcnemar_by_hand():
    """8 gained, 1 lost: 2 (1 + 9) / 2^9; as many of each: 1."""
    assert mcnemar(8, 1) == pytest.approx(20 / 512)
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 0) == 1.0


def test_newcombes_interval_from_the_paper():
    """Newcombe, 1998, method 10, of 36 rows that both have right, 2 lost and 12 gained: 0.0569 to 0.3404."""
    low, high = interval_of_paired_difference(36, 2, 12, 0)
    assert (low, high) == (pytest.approx(0.0569, abs=1e-3), pytest.approx(0.3404, abs=1e-3))
    assert interval_of_paired_difference(0, 0, 0, 0) == (-1.0, 1.0)
    low, high = interval_of_paired_difference(0, 0, 0, 6)
    assert low == pytest.approx(-high)
    assert high > 0.3  # six rows without a change show little


def test_sign_flips_by_hand():
    """Of 2^3 signs of 1, 2, 3 only all plus and all minus are as far: 2 / 8. Rows without a change say nothing."""
    assert sign_flips([1, 2, 3]) == pytest.approx(0.25)
    assert sign_flips([1, 2, 3, 0, 0]) == pytest.approx(0.25)
    assert sign_flips([1, -1]) == 1.0
    assert sign_flips([]) == 1.0
    many = sign_flips([1.0] * 30 + [-1.0] * 10)
    assert many == pytest.approx(0.0022, abs=0.002)  # the binomial's two tails


def test_answers_to_one_prompt_count_as_fewer():
    """Alike in every prompt: as many as prompts. As different as can be: all of them."""
    alike = [1.0, 0.0] * 20
    assert interval_of_shares(alike, 8) == pytest.approx(interval(20, 40), abs=0.01)
    low, high = interval_of_shares([0.5] * 20, 8)
    assert high - low > interval(80, 160)[1] - interval(80, 160)[0] - 1e-9
    assert interval_of_shares([0.2, 0.6], 1) == interval(0.8, 2)


def test_the_bootstrap_covers():
    rng = np.random.default_rng(0)
    hits = sum(low <= 0 <= high for low, high in (bootstrap(rng.normal(size=40).tolist(), 1) for _ in range(60)))
    assert 52 <= hits <= 60
    assert bootstrap([]) == (-math.inf, math.inf)
    assert bootstrap([0.25] * 5) == (0.25, 0.25)


def rows(*is_correct, **more):
    return [{"row": n, "prompt": f"p{n}", "is_correct": right, **more} for n, right in enumerate(is_correct)]


def test_a_change_is_called_one_only_when_it_is():
    before = rows(*[True] * 20, *[False] * 20)
    few = compare_means(pairs_by_prompt(before, rows(*[True] * 22, *[False] * 18)), "is_correct")
    assert (few["gained"], few["lost"], few["p_value"]) == (2, 0, 0.5)
    assert few["difference"] == pytest.approx(0.05)
    assert few["verdict"] == "no difference shown"
    many = compare_means(pairs_by_prompt(before, rows(*[True] * 30, *[False] * 10)), "is_correct")
    assert many["p_value"] == pytest.approx(2 / 2**10)
    assert many["difference_low"] > 0
    assert many["verdict"] == "improved"
    back = compare_means(pairs_by_prompt(rows(*[True] * 30, *[False] * 10), before), "is_correct")
    assert back["verdict"] == "worse"
    json.dumps([few, many])


def test_one_happy_prompt_is_no_improvement():
    one = compare_means(
        pairs_by_prompt([{"row": 1, "prompt": "p", "reward": 0.0}], [{"row": 1, "prompt": "p", "reward": 9.0}]),
        "reward",
    )
    assert one["verdict"] == "no difference shown"
    assert verdict(0.1, 0.3, p_value=0.04) == "improved"
    assert verdict(-0.3, -0.1, p_value=0.06) == "no difference shown"


def test_several_answers_to_a_prompt_are_one_row():
    before = [{"row": 1, "prompt": "p", "is_correct": right} for right in (True, False)]
    after = [{"row": 1, "prompt": "p", "is_correct": True}] * 2
    found = compare_means(pairs_by_prompt(before, after), "is_correct")
    assert (found["baseline"], found["candidate"], found["n"]) == (0.5, 1.0, 1)
    assert "gained" not in found


def test_rows_that_are_not_known_are_counted():
    pairs = pairs_by_prompt(
        [{"row": n, "prompt": "p", "reward": 0.5} for n in (1, 2)],
        [{"row": 1, "prompt": "p", "reward": None}, {"row": 2, "prompt": "p", "reward": 1.0}],
    )
    found = compare_means(pairs, "reward")
    assert (found["n"], found["n_left_out"], found["difference"]) == (1, 1, 0.5)
    assert compare_means(pairs, "missing") == {}
    wins = win_rate([1.0, 1.0, 0.5, 0.0, math.nan])
    assert wins["win_rate"] == 0.625
    assert (wins["win_rate_low"], wins["win_rate_high"]) == pytest.approx(interval(2.5, 4))


def test_other_prompts_are_refused():
    with pytest.raises(DataError, match="answers to different prompts: 2 and 3, 2 in common"):
        pairs_by_prompt(rows(True, True), rows(True, True, True))
    with pytest.raises(DataError, match="row 0 is another prompt in each"):
        pairs_by_prompt(rows(True), [{"row": 0, "prompt": "q", "is_correct": True}])
