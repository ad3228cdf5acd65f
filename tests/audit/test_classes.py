"""Bit classes: exact thresholds, periods, and words for them."""

import pytest

from batchproof.audit.op.classes import bisect_changes, describe, modulus, sizes_to_try


def classes(function, largest=4096):
    found, complete = bisect_changes(function, sizes_to_try(largest, 132), lambda: False)
    assert complete
    return found


@pytest.mark.parametrize("threshold", [2, 9, 71, 100, 256, 257, 1025, 3333, 4096])
def test_a_threshold_is_found_exactly(threshold):
    found = classes(lambda m: m >= threshold)
    first, last = (f"1-{threshold - 1}" if threshold > 2 else "1"), f"{threshold}-4096"
    assert describe(found) == f"{first} | {'4096' if threshold == 4096 else last}"


def test_every_change_is_followed():
    assert describe(classes(lambda m: (m > 150) + (m > 170) + (m > 2900))) == "1-150 | 151-170 | 171-2900 | 2901-4096"


def test_a_class_that_comes_back_is_one_class():
    assert describe(classes(lambda m: 80 < m <= 200)) == "1-80, 201-4096 | 81-200"


@pytest.mark.parametrize("period", [2, 3, 32, 64])
def test_a_period_is_named(period):
    found = classes(lambda m: m % period == 0)
    assert modulus(found) == period
    assert describe(found) == f"by M mod {period}"


def test_no_change_and_all_changes():
    assert describe(classes(lambda m: 0)) == "1-4096"
    assert describe(classes(lambda m: m)) == "every size another"


def test_sizes_cross_powers_of_two_and_the_processors():
    sizes = sizes_to_try(4096, 132)
    assert {255, 256, 257, 131, 132, 133, 527, 528, 529, 4095, 4096} <= set(sizes)
    assert sizes == sorted(set(sizes))
    assert sizes_to_try(1, 132) == [1]


def test_what_was_not_tried_is_not_complete():
    seen = []
    found, complete = bisect_changes(lambda m: m > 9, [1, 2, 20, 40], lambda: len(seen) >= 3 or seen.append(0))
    assert not complete
    assert set(found) < {1, 2, 20, 40} | set(range(2, 21))
