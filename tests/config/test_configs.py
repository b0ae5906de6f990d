"""Every preset of every group composes and trains for one step; misspelt keys name the nearest right one."""

import subprocess
import sys

import pytest
from helpers import TINY, TINY_VIT, tiny, write_cifar, write_image_folder
from presets import PRESETS

from convnn.config.compose import compose_config, config_groups
from convnn.config.identity import differences, fingerprint, identity, run_name
from convnn.errors import ConfigError
from convnn.paper.counts import model_cost
from convnn.train.run import run

GROUPS = config_groups()
CONV = [name for name, operator in PRESETS.items() if operator.kind == "conv"]
ATTENTION = [o for o in GROUPS["operator"] if o not in CONV]


def one_step(overrides, tmp_path):
    config = compose_config([*overrides, "train.max_steps=1", f"run.dir={tmp_path}/run"])
    result = run(config)
    assert result["status"] == "complete" and result["steps"] == 1
    return result


def test_groups_are_those_of_the_design():
    assert set(GROUPS) >= {
        "backbone",
        "operator",
        "swap",
        "schedule",
        "data",
        "optim",
        "train",
        "tracker",
        "experiment",
    }
    assert len(CONV) + len(ATTENTION) == len(GROUPS["operator"]) and CONV and ATTENTION


@pytest.mark.parametrize("operator", CONV)
@pytest.mark.long
def test_operator_on_convolutions(operator, tmp_path):
    # Depthwise makes no 64 channels out of 3, nor 4 out of 64.
    exclude = ["swap.exclude=[conv1,layer1.0.conv1]"] if operator == "depthwise_conv2d" else []
    assert one_step([*TINY, f"operator={operator}", *exclude], tmp_path)["layers_replaced"] > 5


@pytest.mark.parametrize("operator", ATTENTION)
@pytest.mark.long
def test_operator_on_attention(operator, tmp_path):
    assert one_step([*TINY_VIT, f"operator={operator}"], tmp_path)["layers_replaced"] == 2


@pytest.mark.parametrize("swap", GROUPS["swap"])
@pytest.mark.long
def test_swap(swap, tmp_path):
    base = TINY_VIT if swap == "all_attention" else TINY
    replaced = one_step([*base, f"swap={swap}"], tmp_path)["layers_replaced"]
    assert (replaced == 0) == (swap == "none")


@pytest.mark.parametrize("schedule", GROUPS["schedule"])
@pytest.mark.long
def test_schedule(schedule, tmp_path):
    one_step([*TINY, f"schedule={schedule}"], tmp_path)


@pytest.mark.parametrize("optim", GROUPS["optim"])
def test_optim(optim, tmp_path):
    one_step([*TINY, f"optim={optim}", "optim.warmup_epochs=0"], tmp_path)


@pytest.mark.parametrize("train", GROUPS["train"])
def test_train(train, tmp_path):
    one_step([*TINY, f"train={train}", "train.batch_size=32", "train.epochs=1"], tmp_path)


@pytest.mark.parametrize("tracker", GROUPS["tracker"])
@pytest.mark.long
def test_tracker(tracker, tmp_path):
    one_step([*TINY, f"tracker={tracker}"], tmp_path)
    for folder in ("wandb", "tensorboard"):
        assert (tmp_path / "run" / folder).exists() == (tracker == folder)
    assert (tmp_path / "run" / "trackio_id").exists() == (tracker == "trackio")


@pytest.mark.parametrize("data", GROUPS["data"])
@pytest.mark.long
def test_data(data, tmp_path, monkeypatch):
    overrides = [*TINY, f"data={data}", "data.load_size=null", "train.batch_size=8", "swap=none"]
    if data.startswith("cifar"):
        write_cifar(tmp_path / "data", data, monkeypatch)
        overrides += [f"data.root={tmp_path}/data", "data.download=false"]
    if data in ("imagefolder", "imagenet"):
        write_image_folder(tmp_path / "data")
        overrides += [f"data.root={tmp_path}/data", "data.image_size=8"]
    one_step(overrides, tmp_path)


def backbone_overrides(backbone):
    swap = ["swap.depths=[-1]", "operator.k=4"]
    if backbone.startswith("vit"):
        swap = ["operator=convnn_attention", "swap=all_attention"]
    name = ["backbone.name=resnet10t"] if backbone == "timm" else []
    data = ["data=synthetic", "data.size=8", "train.batch_size=2", "tracker=jsonl", "device=cpu"]
    return [f"backbone={backbone}", *name, *swap, *data]


@pytest.mark.parametrize("backbone", GROUPS["backbone"])
def test_backbone(backbone):
    """Built, swapped and run without numbers (meta device); the next test trains them."""
    found = model_cost(compose_config(backbone_overrides(backbone)))
    assert found.params > 2e5 and found.gflops > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("backbone", GROUPS["backbone"])
def test_backbone_trains(backbone, tmp_path):
    result = one_step(backbone_overrides(backbone), tmp_path)
    assert result["layers_replaced"] == (12 if backbone.startswith("vit") else 1) and result["gflops"] > 0.01


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
@pytest.mark.long
def test_experiment(experiment, tmp_path):
    little = ["data=synthetic", "data.limit=64", "data.limit_test=32"] if experiment.startswith("cifar10") else []
    if experiment == "cifar10_fast":  # which is for a GPU
        little += [
            "train.batch_size=32",
            "train.eval_batch_size=32",
            "train.compile=false",
            "train.amp=off",
            *TINY[-2:],
        ]
    result = one_step([f"experiment={experiment}", "tracker=jsonl", "device=cpu", *little], tmp_path)
    assert result["layers_replaced"] > 0


@pytest.mark.parametrize(
    "override, hint",
    [
        ("operator.kk=9", "did you mean 'operator.k'?"),
        ("+operator.kk=9", "did you mean 'operator.k'?"),
        ("++operator.kk=9", "did you mean 'operator.k'?"),
        ("trian.epochs=9", "'train.epochs'"),
        ("operator=convn", "did you mean 'convnn'?"),
        ("experiment=quikstart", "did you mean 'quickstart'?"),
        ("experimnt=quickstart", "did you mean 'experiment'?"),
        ("sede=1", "did you mean 'seed'?"),
        ("operator.similarity=cosin", "did you mean 'cosine'?"),
        ("+swap.rules.a.mach=x", "did you mean 'swap.rules.a.match'?"),
        ("+swap.operator.kk=1", "did you mean 'swap.operator.k'?"),
        ("data=cifar1000", "did you mean 'cifar100'?"),
        ("table=vgg11_k", "use scripts/reproduce.py table=NAME"),
        ("grid=spectrum", "use sweep.py grid=NAME"),
    ],
)
def test_misspelt_names_the_nearest(override, hint):
    with pytest.raises(ConfigError) as error:
        compose_config([override])
    assert hint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides, key",
    [
        (["operator.k=abc"], "operator.k"),
        (["operator.k=1.5"], "operator.k"),
        (["operator.k=null"], "operator.k"),
        (["operator.k=0"], "operator.k"),
        (["operator.k=-1"], "operator.k"),
        (["operator.blend=1.5"], "operator.blend"),
        (["operator.blend=nan"], "operator.blend"),
        (["operator=hybrid", "operator.branch_ratio=-0.1"], "operator.branch_ratio"),
        (["operator.candidates=random", "operator.num_candidates=4"], "operator.num_candidates"),
        (["train.batch_size=0"], "train.batch_size"),
        (["train.epochs=0"], "train.epochs"),
        (["optim.lr=0"], "optim.lr"),
        (["seed=-1"], "seed"),
        (["device=gpu"], "device"),
        (["operator.k=1,9"], "operator.k=1,9"),
        (["foo"], "foo"),
        (["schedule=shrink_k", "schedule.k.start=12"], "schedule.k"),
        (["schedule=linear", "schedule.blend.end=2"], "schedule.blend.end"),
        (["schedule=linear", "schedule.blend.begin=0.5", "schedule.blend.finish=0.5"], "schedule.blend.finish"),
        (["swap.first=2", "swap.last=2"], "swap"),
        (["swap.fraction=[0.5,0.2]"], "swap.fraction"),
        (["backbone=vit_tiny", "data.image_size=33"], "backbone.patch_size"),
        (["run.if_exists=maybe"], "run.if_exists"),
        (["tracker.mode=onlin"], "tracker.mode"),
        (["train.mixup=0.2", "train.batch_size=33"], "train.batch_size"),
    ],
)
def test_bad_values_name_the_key(overrides, key):
    with pytest.raises(ConfigError) as error:
        compose_config(overrides)
    assert key in str(error.value) and "\n" not in str(error.value)


def test_configuration_errors_need_no_torch():
    code = "import sys, convnn.config.compose as c\n"
    code += "c.compose_config(['experiment=quickstart'])\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_fingerprint_ignores_place_and_device_only():
    base = fingerprint(tiny())
    assert fingerprint(tiny("device=auto", "tracker=wandb", "run.root=elsewhere", "data.root=x")) == base
    for change in ("seed=1", "operator.k=4", "train.epochs=3", "data.limit=8", "swap.init=transfer"):
        assert fingerprint(tiny(change)) != base
    assert differences(identity(tiny()), identity(tiny("operator.k=4"))) == ["operator.k: 9 -> 4"]


def test_run_names():
    assert run_name(compose_config(["operator=hybrid", "seed=3"])) == "resnet18-hybrid-k9-b1-r0.5-s3"
    assert run_name(compose_config(["swap=none"])) == "resnet18-s0"
    assert run_name(compose_config(["run.name=a/b c"])) == "a/b c"
