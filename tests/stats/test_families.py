"""Holm's correction against hand calculations, and what a family is."""

import pytest

from convnn.stats.families import holm


def test_a_hand_calculation():
    # Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1; the last is raised to the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_nothing_above_one():
    assert holm([0.4, 0.9, 0.6]) == [1.0, 1.0, 1.0]


def test_the_adjusted_are_those_that_the_steps_of_holm_reject():
    """At each level the adjusted p values reject what the step-down procedure itself does."""
    p = [0.001, 0.2, 0.012, 0.013, 0.049, 0.5, 0.012]
    for level in (0.005, 0.01, 0.05, 0.06, 0.07, 0.2, 0.3):
        rejected = set()
        for step, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[i] > level / (len(p) - step):
                break
            rejected.add(i)
        assert {i for i, value in enumerate(holm(p)) if value <= level} == rejected


def test_a_comparison_without_test_stays_in_the_family():
    assert holm([0.01, None]) == [0.02, None]
    assert holm([None, None]) == [None, None] and holm([]) == []


def test_a_declared_family_may_be_larger_and_not_smaller():
    assert holm([0.01], family=27) == [pytest.approx(0.27)]
    with pytest.raises(ValueError, match="family of 1"):
        holm([0.1, 0.2], family=1)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_no_p_outside_its_range(p):
    with pytest.raises(ValueError, match="within"):
        holm([p])
