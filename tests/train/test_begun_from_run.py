"""Runs that begin from the weights of another run: backbone.checkpoint=DIR."""

import shutil

import pytest
import torch
from helpers import equal_states, tiny
from timm.models import adapt_input_conv

from convnn.config.identity import fingerprint
from convnn.errors import ConfigError
from convnn.models.build import build_network
from convnn.models.swap import neighbor_layers
from convnn.models.weights import adapt_channels, put_weights
from convnn.runs.checkpoint import load_checkpoint
from convnn.train.run import run

SWAP = ["operator=spectrum", "operator.blend=0.5", "swap.last=3"]
SHORT = ["data.size=32", "train.epochs=1", "diagnostics.enabled=false", "optim.lr=0.01"]
SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swapped") / "r"
    run(tiny(*SWAP, *SHORT, "train.epochs=2", "train.ema=0.5", f"run.dir={folder}"))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "r"
    run(tiny("swap=none", *SHORT, f"run.dir={folder}"))
    return folder


def weights_of(folder, kind="model", name="last"):
    content = load_checkpoint(folder / "checkpoints" / f"{name}.pt")[kind]
    return {name: tensor for name, tensor in content.items() if not name.endswith("_extra_state")}


def begun(folder, *overrides, classes=10):
    """Return the network that a configuration begins with."""
    return build_network(tiny(*SHORT, f"backbone.checkpoint={folder}", *overrides), classes, SHAPE)


def same_but_the_head(model, wanted):
    found = model.state_dict()
    return all(torch.equal(found[name], wanted[name]) for name in wanted if not name.startswith("fc."))


def test_replaced_layers_begin_where_the_run_ended(swapped):
    """With averaged weights, as they are what was evaluated; where the layers stand is the new configuration's."""
    model, report, _ = begun(swapped, *SWAP, "operator.blend=0.25", "operator.k=9")
    assert same_but_the_head(model, weights_of(swapped, "ema")) and len(report) == 3
    assert not same_but_the_head(model, weights_of(swapped))
    assert torch.equal(model.fc.weight, weights_of(swapped, "ema")["fc.weight"])
    assert {layer.blend for layer in neighbor_layers(model).values()} == {0.25}


def test_a_network_of_replaced_layers_alone_begins_where_it_ended(tmp_path):
    """As the quickstart's: the first convolution is one of them, a hybrid without a weight of its own."""
    whole = ["operator=hybrid", "swap=all_conv", "swap.init=fresh"]
    run(tiny(*whole, *SHORT, f"run.dir={tmp_path}/r"))
    model, report, _ = begun(tmp_path / "r", *whole, "operator.blend=0.5")
    assert same_but_the_head(model, weights_of(tmp_path / "r")) and "conv1" in {row.name for row in report.rows}


def test_a_first_convolution_takes_images_of_one_channel(swapped):
    model, _, _ = build_network(tiny(*SWAP, f"backbone.checkpoint={swapped}"), 10, (1, 8, 8))
    wanted = weights_of(swapped, "ema")["conv1.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.conv1.weight, wanted)


@pytest.mark.parametrize("base, count", [(3, 1), (1, 3), (3, 4), (3, 8), (4, 3), (2, 6)])
def test_channels_are_adapted_as_timm_does_it(base, count):
    weight = torch.randn(8, base, 3, 3)
    torch.testing.assert_close(adapt_channels(weight, count), adapt_input_conv(count, weight, base))
    assert adapt_channels(weight.flatten(2).half(), count).dtype == torch.float16


@pytest.mark.parametrize(
    "overrides, base, count",
    [
        (["swap=none"], 3, 1),
        (["operator=conv2d"], 3, 1),
        (["operator=spectrum", "operator.similarity=euclidean", "operator.blend=1"], 3, 1),
        (["operator=spectrum", "operator.similarity=dot", "operator.blend=0.5"], 1, 3),
        (["operator=hybrid", "operator.similarity=euclidean"], 3, 1),
        (["operator=hybrid", "operator.similarity=euclidean"], 1, 3),
        (["operator=hybrid"], 1, 4),  # cosine: grey pixels are alike or opposite, of 4 channels without rounding too
        (["operator=hybrid"], 4, 1),
        (["operator=convnn", "operator.aggregation=edge", "operator.similarity=euclidean"], 3, 1),
        (["operator=convnn", "operator.aggregation=gin", "operator.similarity=euclidean"], 1, 3),
        (["operator=depthwise_conv2d"], 2, 1),  # whose weights are the same for any channels
        (["operator=acmix"], 3, 1),
    ],
)
def test_a_first_layer_answers_equal_channels_as_it_answers_grey(overrides, base, count):
    """In float64: selection by features and sums alike."""
    config = tiny(*overrides, *([] if "swap=none" in overrides else ["swap.match=conv1", "swap.init=fresh"]))
    models = {size: build_network(config, 10, (size, 8, 8))[0].double().eval() for size in (base, count)}
    state = {k: v for k, v in models[base].state_dict().items() if not k.endswith("_extra_state")}
    put_weights(models[count], state, config.backbone, count, base)
    images = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    answers = [model.conv1(images.expand(-1, size, -1, -1).contiguous()) for size, model in models.items()]
    torch.testing.assert_close(*answers, rtol=0, atol=1e-12)


@pytest.mark.parametrize("of", [["aggregation=separable"], ["aggregation=max_relative"], ["coordinates=true"]])
def test_a_first_layer_that_cannot_be_adapted_is_refused_with_a_way_out(of):
    config = tiny("operator=convnn", "swap.match=conv1", *(f"operator.{key}" for key in of))
    models = [build_network(config, 10, (size, 8, 8))[0] for size in (3, 1)]
    state = {k: v for k, v in models[0].state_dict().items() if not k.endswith("_extra_state")}
    way = r"stems from images of 3 channels and cannot be adapted to 1 channel: choose data of 3 channels, or leave out"
    with pytest.raises(ConfigError, match=rf"has another shape of conv1\.\S*weight .*; conv1\.\S*weight {way} backb"):
        put_weights(models[1], state, config.backbone, 1, 3)


def test_a_replaced_first_layer_goes_from_colour_to_grey_and_back(tmp_path):
    whole, parts = ["operator=hybrid", "swap=all_conv", *SHORT], ["neighbors.weight", "conv.weight"]
    run(tiny(*whole, f"run.dir={tmp_path}/rgb"))
    more = ["data=digits", "data.limit=32", "data.limit_test=16", f"backbone.checkpoint={tmp_path}/rgb"]
    model, _, _ = build_network(tiny(*whole, *more), 10, (1, 8, 8))
    run(tiny(*whole, *more, f"run.dir={tmp_path}/grey"))
    back, _, _ = begun(tmp_path / "grey", *whole)
    for part in parts:
        rgb, grey = (weights_of(tmp_path / name)[f"conv1.{part}"] for name in ("rgb", "grey"))
        torch.testing.assert_close(model.conv1.get_parameter(part), rgb.sum(1, keepdim=True))
        torch.testing.assert_close(back.conv1.get_parameter(part), grey.expand_as(rgb) / 3)


def test_a_classifier_of_other_classes_begins_anew(swapped):
    model, _, _ = begun(swapped, *SWAP, classes=7)
    assert same_but_the_head(model, weights_of(swapped, "ema")) and model.fc.weight.shape[0] == 7
    named = load_checkpoint(swapped / "checkpoints" / "last.pt")["data"]["classes"]
    config, kept = tiny(*SWAP, f"backbone.checkpoint={swapped}"), weights_of(swapped, "ema")["fc.weight"]
    for names, same in ((named, True), (["x", *named[1:]], False)):  # as many, but other ones
        model, _, _ = build_network(config, 10, SHAPE, names=names)
        assert torch.equal(model.fc.weight, kept) == same


def test_a_plain_runs_weights_are_transferred_to_replaced_layers(plain):
    """The small stem that the run had is the new network's too."""
    model, report, _ = begun(plain, "operator=conv2d", "swap.last=2")
    replaced = tuple(f"{row.name}." for row in report.rows)  # whose weights may be laid out in another order
    kept = {name: tensor for name, tensor in weights_of(plain).items() if not name.startswith(replaced)}
    assert len(report) == 2 and same_but_the_head(model, kept)
    images = torch.randn(2, *SHAPE)
    source, _, _ = begun(plain, "swap=none")
    assert torch.allclose(model.eval()(images), source.eval()(images), atol=1e-5)


def test_a_folder_means_its_last_weights_else_its_best(swapped, tmp_path):
    last, best = (swapped / "checkpoints" / f"{name}.pt" for name in ("last", "best"))
    assert tiny(*SWAP, f"backbone.checkpoint={swapped}").backbone.checkpoint == str(last)
    given, folder = (fingerprint(tiny(*SWAP, f"backbone.checkpoint={place}")) for place in (last, swapped))
    assert given == folder != fingerprint(tiny(*SWAP, f"backbone.checkpoint={best}")) != fingerprint(tiny(*SWAP))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"is a folder without checkpoints/last\.pt or best\.pt; give a run folder"):
        tiny(f"backbone.checkpoint={tmp_path}")
    shutil.copy(best, tmp_path / "checkpoints" / "best.pt")
    assert tiny(f"backbone.checkpoint={tmp_path}").backbone.checkpoint.endswith("best.pt")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["swap=none"], r"of a run with replaced layers, and here none is replaced; take its swap .*from_run=.*/r "),
        (["operator=spectrum", "swap.last=2"], r"layer3\.0\.conv2 is replaced there alone; take its swap"),
        (["operator=spectrum", "swap.last=4"], r"is replaced here alone"),
        ([*SWAP, "operator.slots=rank"], r"by operator\.slots=window, not rank; take its swap"),
        ([*SWAP, "operator.k=4"], "has another shape of "),
        ([*SWAP, "+backbone.kwargs.channels=[4,4,8,16]"], "does not fit resnet18: it has another shape of"),
    ],
)
def test_what_does_not_fit_is_one_line(swapped, overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        begun(swapped, *overrides)
    assert "\n" not in str(error.value)


@pytest.mark.long
def test_a_run_is_fine_tuned_with_frozen_layers(swapped, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "r"
    more = ["data=digits", "data.limit=32", "data.limit_test=16", "backbone.freeze=[conv1,bn1,layer1]"]
    run(tiny(*SWAP, *SHORT, f"backbone.checkpoint={swapped}", f"run.dir={folder}", *more))
    assert "weights stem from the file" in caplog.text and "begin anew" not in caplog.text  # classes 0 to 9 in both
    source, tuned = weights_of(swapped, "ema"), weights_of(folder)
    frozen = [name for name in source if name.startswith(("bn1.", "layer1."))]  # conv1 takes images of one channel now
    assert frozen and equal_states(*({name: state[name] for name in frozen} for state in (source, tuned)))
    assert not torch.equal(source["layer4.0.conv1.weight"], tuned["layer4.0.conv1.weight"])
