"""Calibration: exact on constructed classifiers, and as scikit-learn has it."""

import numpy as np
import pytest
from sklearn.metrics import log_loss

from convnn.analysis.calibration import LEAST, brier_score, negative_log_likelihood, reliability


def drawn(n=300, classes=4):
    rng = np.random.default_rng(0)
    return rng.dirichlet(np.full(classes, 0.5), n), rng.integers(0, classes, n)


def test_ece_of_a_constructed_classifier_is_exact():
    """Of 10 images of confidence 0.65 there are 4 right, of 30 of confidence 0.9 all: 25 % and 10 % off."""
    confidence = np.repeat([0.65, 0.9], [10, 30])
    correct = np.repeat([True, False, True], [4, 6, 30])
    table = reliability(confidence, correct)
    assert table.error == pytest.approx((10 * 0.25 + 30 * 0.1) / 40, abs=1e-12)
    assert table.images[9] == 10 and table.accuracy[9] == 0.4 and table.images[13] == 30
    assert np.isnan(table.accuracy[0]) and table.images.sum() == 40


def test_a_calibrated_classifier_has_no_error_and_a_sure_one_that_errs_has_all():
    assert reliability(np.full(10, 0.7), np.arange(10) < 7).error == pytest.approx(0, abs=1e-12)
    assert reliability(np.ones(5), np.zeros(5, bool)).error == 1


@pytest.mark.parametrize("confidence, place", [(0.2, 2), (0.20001, 3), (0.0, 0), (1.0, 14), (1 / 15, 0), (14 / 15, 13)])
def test_a_bin_holds_its_upper_end(confidence, place):
    assert reliability(np.array([confidence]), np.array([True])).images.argmax() == place


def test_ece_against_a_loop_over_bins():
    probabilities, label = drawn()
    sure, right = probabilities.max(1), probabilities.argmax(1) == label
    expected = 0.0
    for i in range(15):
        inside = [j for j in range(300) if i / 15 < sure[j] <= (i + 1) / 15]
        if inside:
            expected += abs(sum(right[j] - sure[j] for j in inside)) / 300
    assert reliability(sure, right).error == pytest.approx(expected, abs=1e-12)


def test_nll_and_brier_score():
    probabilities, label = drawn()
    assert negative_log_likelihood(probabilities, label) == pytest.approx(
        log_loss(label, probabilities.clip(min=LEAST), labels=range(4)), rel=1e-5
    )
    loop = [
        sum((p - (k == own)) ** 2 for k, p in enumerate(row)) for row, own in zip(probabilities, label, strict=True)
    ]
    assert brier_score(probabilities, label) == pytest.approx(np.mean(loop), abs=1e-12)
    wrong = np.array([[1.0, 0.0]])
    assert brier_score(wrong, np.array([1])) == 2
    assert negative_log_likelihood(wrong, np.array([1])) == pytest.approx(-np.log(LEAST))
