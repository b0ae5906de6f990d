"""Fingerprints never change: they name run folders and tell a sweep what is done.

Those below were computed by the first layout of the package.
"""

import pytest

from convnn.config.compose import compose_config
from convnn.config.identity import fingerprint

VIT = ["backbone=vit_tiny", "swap=all_attention"]
FIRST_VISION_GRAPH = "operator.similarity=euclidean operator.pad_candidates=true operator.k_policy=error"
FIRST_LEARNED = "operator.similarity=dot operator.self_first=false operator.self_score=null operator.inner_bias=false"
PINNED = {
    "experiment=quickstart": "ce79e6585b1fe2b7",
    "operator=acmix": "3ee1fb9fd69a9e3f",
    "operator=conv2d": "4beb32cda1a34a0d",
    "operator=convit": "9ac1df3831d61f07",
    "operator=convnn": "9a08866e4ab9cf29",
    "operator=convnn_attention": "a0819eb3dc5f32a3",
    "operator=convnn_coordinates": "0ff74f4cde83305f",
    f"operator=convnn_learned {FIRST_LEARNED}": "61d977af1f6a3140",
    "operator=depthwise_conv2d": "ce81a44efa43b3c5",
    "operator=hybrid": "2ee682ccb6a59e51",
    "operator=hybrid_attention operator.branch_input=all": "1b5cef36ae387736",
    "operator=kvt": "77fa6d9ee238eade",
    "operator=local_window": "75be1f88a9f05ffb",
    "operator=mhsa": "fa1309ae50ad6f95",
    "operator=neighborhood": "35b47870c2794878",
    "operator=spectrum": "1b76bc2250ae6e27",
    "operator=strided_sparse": "534bd76862fe26cc",
    f"operator=vision_graph {FIRST_VISION_GRAPH}": "ca2e753a05ba7e7d",
    "schedule=shrink_k": "4fccf4a89e91035e",
    "data=imagenet": "46a2944e6619ddfa",
    "data=imagenet backbone.stem=small": "b087730ca50c02b2",
    "optim=paper": "663b3db2851a259a",
    "train=paper": "565bb3cbcf53072a",
    "+swap.operator.k=4 +swap.rules.a.match=layer1.* +swap.rules.a.operator.k=1": "b774117fddac2d60",
}


@pytest.mark.parametrize("overrides", PINNED)
def test_fingerprints_are_those_of_the_first_layout(overrides):
    given = overrides.split()
    if given[0].startswith("operator=") and compose_config(given).operator.kind == "attention":
        given += VIT
    assert fingerprint(compose_config(given)) == PINNED[overrides]


def test_a_rules_own_operator_keeps_its_first_name():
    rule = ["+swap.rules.a.match=layer1.*", "+swap.rules.a.operator.target="]
    first = fingerprint(compose_config([rule[0], rule[1] + "convnn.layers.ConvNN2d"]))
    assert fingerprint(compose_config([rule[0], rule[1] + "convnn.ConvNN2d"])) == first


@pytest.mark.parametrize(
    "overrides, same",
    [
        ("data=cifar10 backbone.stem=small", True),
        ("data=digits", True),
        ("data=cifar10 data.load_size=224", True),  # which these files do not follow
        ("data=synthetic", True),
        ("data=synthetic data.load_size=64", False),
        ("data=cifar10 data.image_size=64", False),
        ("data=cifar10 backbone.image_size=224", False),
        ("data=imagefolder data.root=x data.load_size=32", True),
        ("data=imagefolder data.root=x", None),
        ("data.target=mine.load data.load_size=32", None),
    ],
)
def test_the_stem_that_follows_the_images_is_the_one_it_becomes(overrides, same):
    own = overrides.split()
    found, small, large = (fingerprint(compose_config([*own, *more])) for more in ([], SMALL_STEM, LARGE_STEM))
    assert (found == small, found == large) == (same is True, same is False)


SMALL_STEM, LARGE_STEM = ["backbone.stem=small"], ["backbone.stem=default"]


def test_fresh_weights_by_default_are_the_same_run_until_the_backbone_loads_some():
    fresh = "swap.init=fresh"
    assert fingerprint(compose_config()) == fingerprint(compose_config([fresh]))
    for loads in ("backbone.pretrained=true", "+backbone.kwargs.checkpoint_path=x.pt"):
        assert fingerprint(compose_config([loads])) != fingerprint(compose_config([loads, fresh]))


@pytest.mark.parametrize(
    "key", ["train.log_every=7", "checkpoint.keep=last", "checkpoint.optimizer=false", "checkpoint.predictions=off"]
)
def test_what_does_not_change_the_outcome_is_no_part(key):
    assert fingerprint(compose_config([key])) == fingerprint(compose_config())
