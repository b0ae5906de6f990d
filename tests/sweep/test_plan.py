"""From a grid to points: expansion, precedence, checks, duplicates; and all grids of conf/ are whole."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from convnn.config.compose import CONF_DIR, compose_config
from convnn.config.identity import fingerprint, identity
from convnn.config.overrides import merge_overrides, quoted
from convnn.errors import ConfigError
from convnn.sweep.describe import NO_SPECTRUM, describe_plan, moved_axes
from convnn.sweep.options import SweepConfig, sweep_options
from convnn.sweep.plan import load_point, make_plan, read_plan, save_plan

GRIDS = sorted(p.stem for p in (CONF_DIR / "grid").glob("*.yaml"))


def plan(*given, **options):
    return make_plan(SweepConfig(**options), given)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.long
def test_every_grid_is_valid_and_says_its_name(grid):
    options = sweep_options([f"grid={grid}"])
    found = make_plan(options, [])
    assert options.name == grid and options.dir == f"sweeps/{grid}"
    assert len(found.points) >= 9 and not found.invalid and not found.duplicates


@pytest.mark.long
def test_points_are_what_train_composes():
    for grid in GRIDS:
        for point in make_plan(sweep_options([f"grid={grid}"]), ["train.epochs=2"]).points[::7]:
            assert fingerprint(compose_config(point.overrides)) == point.fingerprint


def test_axes_multiply_and_the_command_line_counts_more():
    axes = {"operator.k": [1, 4], "operator.blend": "range(0,1.01,0.5)", "seed": [0, 1]}
    assert len(plan(axes=axes).points) == 12
    found = plan("operator.k=9", "operator.blend=0.5,1", base=["operator.k=3", "operator=spectrum"], axes=axes)
    configs = found.configs.values()
    assert len(configs) == 4
    assert {(c.operator.k, c.operator.blend) for c in configs} == {(9, 0.5), (9, 1.0)}
    assert {c.operator.name for c in configs} == {"spectrum"}
    assert found.axes == {"operator.blend": ["0.5", "1"], "seed": ["0", "1"]}


def test_named_points_are_crossed_with_axes_and_name_the_folder():
    found = plan(points={"a": ["swap=none"], "b": ["operator.k=4", "swap.stages=[1,2]"]}, axes={"seed": [0, 1]})
    assert [p.label for p in found.points] == ["a", "a", "b", "b"]
    assert found.points[2].name.startswith("b-resnet18-convnn-k4-b1-s0-")
    assert found.configs[found.points[3].fingerprint].swap.stages == [1, 2]


def test_group_axes_lists_and_added_keys():
    found = plan("swap=first_half,last_half", "swap.exclude=[a],[b,c]", "+backbone.kwargs.zero_init_last=true,false")
    assert len(found.points) == 8 and not found.invalid
    assert {tuple(c.swap.exclude) for c in found.configs.values()} == {("a",), ("b", "c")}


def test_values_of_every_kind_survive_yaml():
    axes = {"swap.stages": [[1], [2, 3], None], "data.flip": [True, False], "run.name": ["a b", "it's"]}
    configs = plan(axes=axes).configs.values()
    assert {(tuple(c.swap.stages or ()), c.data.flip) for c in configs} == {
        (stages, flip) for stages in ((1,), (2, 3), ()) for flip in (True, False)
    }


def test_duplicates_are_merged():
    found = plan("operator.k=4,4,9", "device=cpu,auto")
    assert len(found.points) == 2 and found.duplicates == 4


def test_points_that_differ_in_nothing_that_counts_are_merged():
    found = plan("swap=none,first_half", "operator.k=4,9", "operator.blend=0,0.5,1", "seed=0,1")
    assert len(found.points) == 2 + 2 * 6 and found.duplicates == 2 * 5
    plain = [p for p in found.points if not found.configs[p.fingerprint].swap.effective_rules()]
    assert [found.configs[p.fingerprint].seed for p in plain] == [0, 1]
    lines = [line.split("  ")[-1] for line in describe_plan(found, Path("none"), SweepConfig()).splitlines()]
    assert lines.count("swap=none seed=0") == 1 and lines.count("swap=none seed=1") == 1
    assert len(plan("schedule=linear", "operator.blend=0,1").points) == 1
    assert len(plan("schedule=constant", "operator.blend=0,1").points) == 2
    assert len(plan("schedule.blend.start=0,0.5").points) == 1  # of a constant one
    assert len(plan("operator.num_candidates=9,16").points) == 1
    assert len(plan("operator.num_candidates=9,16", "operator.candidates=random").points) == 2
    foreign = ["operator.target=mine.Operator", "swap=first_half"]  # may read any setting, and is moved by no schedule
    for axis in ("operator.num_candidates=9,16", "operator.blend=0,1 schedule=linear"):
        assert len(plan(*axis.split(), *foreign).points) == 2
    own = ["+swap.rules.a.match=layer1.*", "+swap.rules.a.operator.candidates=random"]
    assert len(plan("operator.num_candidates=9,16", *own).points) == 2


def test_an_operator_for_other_layers_is_an_invalid_point():
    found = plan("operator=convnn,convnn_attention", "swap=all_conv")
    assert len(found.points) == 1 and "set swap=all_attention" in found.invalid[0][1]


def test_invalid_points_have_their_reason_and_the_others_stay():
    found = plan("operator.k=4,0", "operator.blend=0.5,2", "operator=convnn,convn")
    assert len(found.points) == 1 and len(found.invalid) == 7
    reasons = [reason for _, reason in found.invalid]
    assert any("operator.k=0 must lie" in r for r in reasons) and any("did you mean 'convnn'" in r for r in reasons)


def test_names_are_harmless_and_values_may_refer():
    (point,) = plan("run.name='../../x y'", "train.epochs=${seed}", "seed=4", "optim.warmup_epochs=0").points
    assert point.name.startswith("_.._x_y-") and "/" not in point.name
    found = plan("operator=glob(conv2*)")
    assert [c.operator.name for c in found.configs.values()] == ["conv2d"]


def test_quoted_texts_are_read_back():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for text in ("a b", "it's", "a,b", "x=y", "[1]", "b\\c", "end\\", "q\\'", "${x}", " lead", "#", "{a:1}"):
        assert OverridesParser.create().parse_override(f"k={quoted(text)}").value() == text


def test_a_value_that_others_refer_to():
    found = plan("schedule=shrink_k", "operator.k=9,16")
    assert sorted(c.schedule.k.start for c in found.configs.values()) == [9.0, 16.0]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["grid=spectrm"], "did you mean 'spectrum'"),
        (["sweep.drun=true"], "did you mean 'sweep.dry_run'"),
        (["sweep.on_invalid=maybe"], "sweep.on_invalid=maybe"),
        (["sweep.jobs_per_device=0"], "sweep.jobs_per_device=0"),
        (["+sweep.axes.seed=[]"], "sweep.axes.seed is empty"),
    ],
)
def test_bad_sweep_options_name_the_key(overrides, message):
    with pytest.raises(ConfigError) as error:
        sweep_options(overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("given", [["operator.k=1,,2"], ["foo"], ["operator.kk=1,2"], ["seed=range(0,3"]])
def test_overrides_that_hydra_cannot_read(given):
    try:
        found = plan(*given)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert found.invalid and not found.points


def test_merge_overrides_keeps_the_last_and_its_plus():
    merged = merge_overrides(["+backbone.kwargs.depth=2", "seed=0"], ["seed=1", "backbone.kwargs.depth=3"])
    assert merged == ["+backbone.kwargs.depth=3", "seed=1"]


def test_sweep_and_train_share_their_defaults():
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        sweep = compose("sweep", [])
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(sweep, resolve=True)
    values.pop("sweep")
    from convnn.config.compose import from_hydra

    assert identity(from_hydra(OmegaConf.create(values))) == identity(compose_config())


def test_plan_file_keeps_the_points_of_other_commands(tmp_path):
    first, second = plan("operator.k=4,9"), plan("operator.k=9,16")
    save_plan(first, tmp_path, ["sweep.py", "one"], "one")
    save_plan(second, tmp_path, ["sweep.py", "two"], "two")
    stored = read_plan(tmp_path)
    assert len(stored["points"]) == 3 and stored["command"] == ["sweep.py", "two"]
    assert stored["axes"] == {"operator.k": ["9", "16"]}
    for point in (*first.points, *second.points):
        assert load_point(tmp_path, point.fingerprint) == point
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ConfigError, match=r"plan\.json is damaged"):
        read_plan(tmp_path)


@pytest.mark.long
def test_five_hundred_points_are_planned_in_seconds_without_torch():
    code = (
        "import sys\nfrom convnn.sweep.plan import make_plan\nfrom convnn.sweep.options import SweepConfig\n"
        "p = make_plan(SweepConfig(), ['operator.k=range(1,26)', 'operator.blend=range(0,1.01,0.25)',\n"
        "    'seed=0,1,2,3'])\n"
        "assert len(p.points) == 500 and 'torch' not in sys.modules"
    )
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.monotonic() - start < 30


def test_axes_without_an_effect_are_named():
    found = plan("operator=acmix,hybrid", "operator.k=4,9", "operator.blend=0,1", "swap=all_conv")
    equal = "points that differ in it alone are merged"
    assert moved_axes(found) == [
        f"operator.blend is an axis, but operator=acmix has none: {equal}",
        f"operator.k is an axis, but operator=acmix has none: {equal}",
    ]
    assert moved_axes(plan("operator=hybrid,convnn", "operator.blend=0,1")) == []
    (line,) = moved_axes(plan("schedule=linear", "operator.blend=0,1"))
    assert line == f"operator.blend is an axis, but a schedule moves it: {equal}"


def test_operators_without_a_spectrum_are_those_that_cannot_move():
    """Of all presets; a hybrid has it in its branch of neighbours."""
    from convnn.config.presets import operator_of
    from convnn.config.targets import resolve_target
    from convnn.nn.base import NeighborLayer

    targets = {operator_of(path.stem).target for path in (CONF_DIR / "operator").glob("*.yaml")}
    without = {t for t in targets if not issubclass(resolve_target(t, "target"), NeighborLayer) and "Hybrid" not in t}
    assert without == set(NO_SPECTRUM)


def test_the_plan_keeps_the_sweeps_name(tmp_path):
    save_plan(plan("seed=0,1"), tmp_path, ["sweep.py"], "mine")
    assert read_plan(tmp_path)["name"] == "mine"
