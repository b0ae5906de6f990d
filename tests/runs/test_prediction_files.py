"""The file predictions.npz: exact both ways, equal bytes for equal content, one line for what is damaged."""

import io

import numpy as np
import pytest

from convnn.errors import ConfigError
from convnn.runs.contents import EVALUATIONS, PREDICTIONS
from convnn.runs.predictions import KeptPredictions, archive, read_predictions, write_predictions


def made(images=50, classes=300, seed=0, shares=True, epoch=4):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, images)
    label[0] = classes - 1
    predicted = np.where(rng.random(images) < 0.5, label, rng.integers(0, classes, images))
    probabilities = rng.dirichlet(np.ones(classes), images).astype(np.float16) if shares else None
    return KeptPredictions(np.arange(images), label, predicted, probabilities, epoch)


def equal(a, b):
    same = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("index", "label", "predicted"))
    shares = (a.probabilities is None) == (b.probabilities is None)
    return same and shares and a.epoch == b.epoch and (not shares or np.array_equal(a.probabilities, b.probabilities))


@pytest.mark.parametrize("classes", [2, 256, 257, 1000])
@pytest.mark.parametrize("shares", [True, False])
def test_what_is_read_is_what_was_written(classes, shares, tmp_path):
    last, best = made(classes=classes, shares=shares), made(classes=classes, shares=shares, epoch=1)
    best.predicted = best.label.copy()
    write_predictions(tmp_path / PREDICTIONS, {"last": last, "best": best})
    assert equal(read_predictions(tmp_path), last) and equal(read_predictions(tmp_path, "best"), best)
    assert read_predictions(tmp_path).predicted.dtype == np.int64


def test_equal_predictions_make_equal_bytes():
    files = [io.BytesIO(), io.BytesIO()]
    for file in files:
        archive(file, {"last": made()})
    assert files[0].getvalue() == files[1].getvalue()


def test_what_is_missing_is_none_and_an_evaluation_stands_in(tmp_path):
    assert read_predictions(tmp_path) is None
    write_predictions(tmp_path / PREDICTIONS, {"best": made(seed=1)})
    assert read_predictions(tmp_path) is None and equal(read_predictions(tmp_path, "best"), made(seed=1))
    (tmp_path / EVALUATIONS / "last").mkdir(parents=True)
    write_predictions(tmp_path / EVALUATIONS / "last" / PREDICTIONS, {"last": made(seed=2, epoch=None)})
    assert equal(read_predictions(tmp_path), made(seed=2, epoch=None))


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def other_lengths(path):
    np.savez(path, index=np.arange(3), label=np.arange(3), predicted=np.arange(2))


def text(path):
    np.savez(path, index=np.array(["a"]), label=np.array(["b"]), predicted=np.array(["c"]))


def objects(path):
    np.savez(path, index=np.array([{}]), label=np.array([0]), predicted=np.array([0]))


def few_shares(path):
    np.savez(path, index=np.arange(2), label=np.arange(2), predicted=np.arange(2), probabilities=np.ones((3, 2)))


def no_labels(path):
    np.savez(path, index=np.arange(2), predicted=np.arange(2))


def endless_epoch(path):
    np.savez(path, index=np.arange(2), label=np.arange(2), predicted=np.arange(2), epoch=np.inf)


def encrypted(path):
    """Spoil the bit of the archive's list that says that a member is encrypted."""
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        *(cut, other_lengths, text, objects, few_shares, no_labels, endless_epoch, encrypted),
        lambda path: path.write_bytes(b""),
    ],
)
def test_a_damaged_file_is_one_line(damage, tmp_path):
    path = tmp_path / PREDICTIONS
    write_predictions(path, {"last": made()})
    damage(path)
    with pytest.raises(ConfigError, match=r"predictions\.npz is damaged \(.*\); remove it") as raised:
        read_predictions(tmp_path)
    assert "\n" not in str(raised.value)
