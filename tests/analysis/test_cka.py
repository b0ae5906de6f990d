"""Linear CKA on known cases, and between networks."""

import numpy as np
import pytest
import torch

from convnn.analysis.base import ArmResults
from convnn.analysis.cka import FIRST, OWN, compare, gram_vector, linear_cka


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("debiased", [False, True])
def test_features_are_like_themselves_however_turned_scaled_and_moved(debiased):
    x = normal(20, 6)
    turned = torch.linalg.qr(normal(6, 6, seed=1))[0]
    for other in (x, x @ turned, 3.5 * x, -x, x + 100, 0.01 * x @ turned - 7):
        assert linear_cka(x, other, debiased=debiased) == pytest.approx(1, abs=1e-10)
    stretched = x * torch.tensor([1, 1, 1, 1, 1, 9.0])  # no rotation: it is not to be invariant to that
    assert linear_cka(x, stretched, debiased=debiased) < 0.9


def test_it_is_the_definition():
    """Kornblith et al., equation 3, and Song et al., equation 5, from centring matrices and sums in NumPy."""
    x, y = normal(12, 5).numpy(), normal(12, 7, seed=3).numpy() + normal(12, 7).numpy()
    n = 12
    K, L = x @ x.T, y @ y.T
    H = np.eye(n) - 1 / n

    def biased(a, b):
        return np.trace(H @ a @ H @ H @ b @ H)

    def unbiased(a, b):
        a, b = a - np.diag(np.diag(a)), b - np.diag(np.diag(b))
        one = np.ones(n)
        first = np.trace(a @ b) + (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
        return (first - 2 / (n - 2) * (one @ a @ b @ one)) / (n * (n - 3))

    x_of, y_of = torch.from_numpy(x), torch.from_numpy(y)
    for hsic, debiased in ((biased, False), (unbiased, True)):
        expected = hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))
        assert linear_cka(x_of, y_of, debiased=debiased) == pytest.approx(expected, abs=1e-10)


def test_independent_features_of_many_dimensions_are_not_alike_once_debiased():
    x, y = normal(24, 3000), normal(24, 3000, seed=1)
    assert linear_cka(x, y, debiased=False) > 0.9
    assert abs(linear_cka(x, y)) < 0.2


def test_features_that_say_nothing_are_like_nothing():
    assert linear_cka(torch.ones(8, 3), normal(8, 3)) == 0
    assert gram_vector(torch.ones(8, 3)).norm() == 0


def result(features, images="same"):
    vectors = np.stack([gram_vector(one).numpy() for one in features])
    return {"layers": ["a", "b"], "images": images, "series": {}, "arrays": {"vectors": vectors}}


def test_networks_are_compared_with_other_seeds_of_the_first_arm():
    seeds = (0, 1, 2)
    runs = {(arm, s): [normal(10, 4, seed=10 * arm + s + at) for at in (0, 50)] for arm in (0, 1) for s in seeds}
    arms = [
        ArmResults(f"blend={arm}", {"operator.blend": float(arm)}, {s: result(runs[arm, s]) for s in seeds})
        for arm in (1, 0)
    ]
    late, early = compare(arms)
    found = late.results[2]["series"]
    for at, layer in enumerate("ab"):
        for name, arm in ((FIRST, 0), (OWN, 1)):
            expected = linear_cka(runs[1, 2][at], runs[arm, 0][at])  # the seed after the last
            assert found[name]["at"][at] == layer and found[name]["values"][at] == pytest.approx(expected)
    assert early.results[0]["series"][FIRST] == early.results[0]["series"][OWN]


def test_networks_that_saw_other_images_are_not_compared():
    features = [normal(10, 4), normal(10, 4, seed=1)]
    (compared,) = compare([ArmResults("all runs", {}, {0: result(features), 1: result(features, "others")})])
    assert all(FIRST not in one["series"] for one in compared.results.values())
