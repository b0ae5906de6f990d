"""The paper's tables: every row composes, its model has the published size, and counts are what they claim to be."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convnn import ConvNN2d, ConvNNAttention
from convnn.config.composer import Composer
from convnn.errors import ConfigError
from convnn.nn.hybrid import HybridConvNN2d
from convnn.ops.aggregation import in_blocks
from convnn.paper.counts import count_both_ways, model_cost, parameters
from convnn.paper.published import PaperRow, load_table, read_rows, table_names

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT.parent / "shared" / "paper"
ROWS = {
    "resnet50_imagenet": 22,
    "vgg11_branching": 54,
    "vgg11_k": 78,
    "vgg11_learned": 40,
    "vgg11_lr": 30,
    "vgg11_n": 118,
    "vgg11_shuffle": 4,
    "vit_base_imagenet": 26,
    "vit_tiny_baselines": 16,
    "vit_tiny_hybrid": 6,
    "vit_tiny_k": 76,
    "vit_tiny_n": 52,
    "vit_tiny_types": 6,
}
PUBLISHED_SIZES = {"resnet50_imagenet": 5, "vit_base_imagenet": 9, "vgg11_learned": 10, "vgg11_shuffle": 2}
PUBLISHED_SIZES |= {"vit_tiny_hybrid": 0, "vit_tiny_types": 0}
"""Rows whose size was published, in tables where not all were."""
compose = Composer()


def digits_equal(counted, published):
    """Compare with 8 printed decimals of a log, or 3 cut off on the web page."""
    if counted is None:
        return False
    return round(counted, 8) == published or math.floor(counted * 1000) / 1000 == published


# ------------------------------------------------------------------------------------------------------ the tables


def test_tables_and_their_rows():
    assert {name: len(load_table(name).rows) for name in table_names()} == ROWS
    for name in ROWS:
        table = load_table(name)
        assert table.name == name and table.title and table.noise_source
        assert len({row.row for row in table.rows}) == len(table.rows)
        for row in table.rows:
            assert row.source.startswith("Convolutional-Nearest-Neighbor") and ":" in row.source
            assert row.top1_last is not None or "not at hand" in row.note or name == "vit_tiny_types"
            assert None in (row.top1_best, row.top1_last) or row.top1_best >= row.top1_last
        assert bool(table.needs) == name.endswith("imagenet")


def test_branching_has_nine_ratios_of_three_kinds_on_two_data_sets():
    names = {row.row for row in load_table("vgg11_branching").rows}
    ratios = [f"{i / 8:g}" for i in range(9)]
    kinds = ["features", "coordinates", "coordinates-both"]
    assert names == {f"{d}-{k}-r{r}" for d in ("cifar10", "cifar100") for k in kinds for r in ratios}


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'vgg11_k'"):
        load_table("vgg11_kk")
    with pytest.raises(ConfigError, match="did you mean 'cifar10-k9-conv3'"):
        load_table("vgg11_k").row("cifar10-k9-conv33")


def test_a_damaged_csv_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.csv"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_text("row,params\na,1\n")
    with pytest.raises(ConfigError, match="columns"):
        read_rows(tmp_path / "a.csv")


def test_published_needs_no_torch():
    code = "import sys, convnn.paper.published as p\np.load_table('vgg11_k')\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_a_careful_row_keeps_the_recipe():
    table = load_table("vgg11_lr")
    row = table.row("cifar100-hybrid-lr0.0005")
    plain, careful = (compose(table.overrides(row, careful=c, extra=["seed=1"])) for c in (False, True))
    assert (plain.data.crop_padding, plain.data.flip, plain.data.val_fraction) == (0, False, 0)
    assert (careful.data.crop_padding, careful.data.flip, careful.data.val_fraction) == (4, True, 0.1)
    assert plain.seed == careful.seed == 1 and plain.optim == careful.optim and plain.operator == careful.operator
    assert (plain.optim.lr, plain.optim.weight_decay, plain.optim.clip_grad) == (5e-4, 0.01, 1.0)
    assert plain.data.name == "cifar100" and plain.optim.sched == "constant" and plain.train.batch_size == 256


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.long
def test_rows_compose_and_have_the_published_size(name):
    """A few rows of each table; the next test takes all of them."""
    some = check_sizes(name, slice(0, None, max(len(load_table(name).rows) // 6, 1)))
    assert (some > 0) == (PUBLISHED_SIZES.get(name) != 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_every_row_composes_and_has_the_published_size(name):
    assert check_sizes(name, slice(None)) == PUBLISHED_SIZES.get(name, ROWS[name])


def check_sizes(name, part):
    table, compared = load_table(name), 0
    for row in table.rows[part]:
        config = compose(table.overrides(row))
        assert (config.train.epochs, config.seed) == (row.epochs, row.seed), row.row
        if row.params is not None:
            assert parameters(config) == row.params, row.row
            compared += 1
    return compared


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.long
def test_operations_are_the_published_ones(name):
    """A few rows of each table; the next test takes all of them."""
    check_operations(name, slice(0, None, len(load_table(name).rows) // 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_all_operations_are_the_published_ones(name):
    check_operations(name, slice(None))


def check_operations(name, part):
    table = load_table(name)
    for row in table.rows[part]:
        found = model_cost(compose(table.overrides(row)))
        assert found.gflops > 0.2
        if row.gflops is not None:
            assert digits_equal(found.gflops_profiler, row.gflops), (row.row, found.gflops_profiler, row.gflops)


@pytest.mark.skipif(not PAPER.is_dir(), reason="needs the published figures beside the project")
def test_the_files_are_what_the_script_writes(tmp_path):
    script = [sys.executable, ROOT / "scripts" / "collect_published.py", f"from={PAPER}", f"out={tmp_path}"]
    subprocess.run(script, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    for name in ROWS:
        assert (tmp_path / f"{name}.csv").read_bytes() == load_table(name).published.read_bytes(), name
    with (PAPER / "vgg11_k.csv").open() as file:
        line = next(line for line in csv.DictReader(file) if line["k"] == "8" and line["kernel_size"] == "3")
    row = load_table("vgg11_k").row("cifar10-k8-conv3")
    assert (str(row.top1_best), str(row.params)) == (line["top1_best"].rstrip("0"), line["params"])


def test_rows_are_plain_facts():
    row = load_table("vit_tiny_baselines").row("cifar10-local")
    assert isinstance(row, PaperRow) and row.params == 4_299_658 and "64" in row.note


# ------------------------------------------------------------------------------------------------------ the counts


class Net(nn.Module):
    """A layer with its surroundings: a convolution and a classifier."""

    def __init__(self, layer, tokens):
        super().__init__()
        self.stem, self.layer, self.tokens, self.head = nn.Conv2d(3, 8, 3, padding=1), layer, tokens, nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        if not self.tokens:
            return self.head(self.layer(x).mean((2, 3)))
        return self.head(self.layer(x.flatten(2).transpose(1, 2)).mean(1))


AROUND = 2 * 64 * 8 * 27 + 2 * 8 * 5
LAYERS = {  # layer, does it work on tokens, operations of one 8x8 image worked out by hand
    # 64 queries, 100 tokens: scores, and one product with the 9 neighbours
    "conv": (lambda: ConvNN2d(8, 8, 9), False, 2 * 64 * 100 * 8 + 2 * 64 * 72 * 8),
    "conv at position": (lambda: ConvNN2d(8, 8, 9, blend=0.0, slots="raster"), False, 2 * 64 * 72 * 8),
    # elementwise: two operations a neighbour and channel
    "depthwise": (lambda: ConvNN2d(8, 8, 9, aggregation="depthwise"), False, 2 * 64 * 100 * 8 + 2 * 64 * 9 * 8),
    # projections, scores, scores of the neighbours, softmax weights, and the weighted sum
    "kvt": (
        lambda: ConvNNAttention(8, 2, 9, aggregation="sum"),
        True,
        8 * 64 * 64 + 2 * 64 * 64 * 8 + 2 * 64 * 9 * 8 + 2 * 64 * 9 * 8,
    ),
    "convnn attention": (
        lambda: ConvNNAttention(8, 2, 9),
        True,
        8 * 64 * 64 + 2 * 64 * 64 * 8 + 2 * 64 * 9 * 8 + 3 * 64 * 9 * 8,
    ),
    "attention": (lambda: ConvNNAttention(8, 2, 64, aggregation="sum"), True, 8 * 64 * 64 + 4 * 64 * 64 * 8),
}


@pytest.mark.parametrize("case", LAYERS)
def test_honest_count_of_small_models(case):
    build, tokens, operations = LAYERS[case]
    model, image = Net(build(), tokens), torch.randn(1, 3, 8, 8)
    assert count_both_ways(model, image)[0] == AROUND + operations
    assert count_both_ways(model.to("meta"), image.to("meta"))[0] == AROUND + operations


@pytest.mark.parametrize("case", LAYERS)
def test_honest_count_is_at_least_what_runs(case):
    build, tokens, _ = LAYERS[case]
    model, image = Net(build(), tokens).eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad(), in_blocks(), FlopCounterMode(display=False) as counter:
        model(image)
    missed = {"depthwise": 2, "kvt": 2, "convnn attention": 3}.get(case, 0) * 64 * 9 * 8
    assert count_both_ways(model, image)[0] == counter.get_total_flops() + missed


def test_profiler_count_leaves_out_what_the_authors_missed():
    image = torch.randn(1, 3, 8, 8)
    neighbors, conv = ConvNN2d(8, 4, 9), nn.Conv2d(8, 4, 3, padding=1)
    hybrid = Net(HybridConvNN2d(neighbors, conv), tokens=False)
    assert count_both_ways(hybrid, image)[1] == AROUND + 2 * 100 * 100 * 8 + 2 * 64 * 64
    assert count_both_ways(Net(ConvNN2d(8, 8, 9, candidates="random", num_candidates=20), False), image)[1] == (
        AROUND + 2 * 100 * 20 * 8
    )
    attention = Net(ConvNNAttention(8, 1, 9), tokens=True)
    assert count_both_ways(attention, image)[1] == AROUND + 8 * 64 * 64 + 2 * 64 * 64 * 8 + 64 * 9 * 8


def test_profiler_count_is_none_where_the_rule_is_not_known():
    image = torch.randn(1, 3, 8, 8)
    for layer in (ConvNN2d(8, 8, 9, similarity="euclidean"), ConvNN2d(8, 8, 9, blend=0.5)):
        assert count_both_ways(Net(layer, False), image)[1] is None
    for layer in (ConvNNAttention(8, 2, 9, aggregation="sum"), ConvNNAttention(8, 2, 9, similarity="cosine")):
        assert count_both_ways(Net(layer, True), image)[1] is None


def test_a_model_that_cannot_run_is_refused():
    with pytest.raises(ConfigError, match="exceeds"):
        count_both_ways(Net(ConvNN2d(8, 8, 200), tokens=False), torch.randn(1, 3, 8, 8))
