"""Random configurations from training to report: evaluation has the own numbers of each, a refusal is one line."""

import csv
import json
import random

import pytest
import torch
from helpers import write_image_folder

from convnn.cli.evaluate import evaluate
from convnn.cli.report import report
from convnn.config.compose import compose_config
from convnn.errors import ConfigError
from convnn.train.run import run

COMMON = ["train.epochs=1", "optim.warmup_epochs=0", "tracker=jsonl", "device=cpu"]
DATA = {
    "synthetic": ["data=synthetic", "data.size=60", "data.load_size=8"],
    "digits": ["data=digits", "data.limit=60", "data.limit_test=45"],
    "folder": ["data=imagefolder", "data.mean=[0.4,0.5,0.6]", "data.std=[0.2,0.3,0.4]", "data.workers=0"],
}
BACKBONES = {
    "resnet": ["backbone=resnet18", "+backbone.kwargs.channels=[4,4,8,8]", "+backbone.kwargs.layers=[1,1,1,1]"],
    "vit": [
        "backbone=vit_tiny", "backbone.image_size=16", "+backbone.kwargs.depth=2", "+backbone.kwargs.embed_dim=24",
    ],
}  # fmt: skip
CONV = ["conv2d", "convnn", "convnn_coordinates", "convnn_learned", "spectrum", "hybrid", "vision_graph", "acmix"]
ATTENTION = [
    "mhsa", "kvt", "neighborhood", "local_window", "strided_sparse", "convnn_attention", "hybrid_attention", "convit",
]  # fmt: skip
CHOICES = {
    "operator.k": [1, 4, 5, 9, 16],
    "operator.blend": [0, 0.3, 0.5, 0.9, 1],
    "operator.k_policy": ["error", "clamp"],
    "operator.similarity": ["cosine", "euclidean", "dot"],
    "operator.mix": ["sum", "concat"],
    "operator.distance": ["chebyshev", "euclidean"],
    "operator.candidates": ["all", "random", "grid", "window", "stride"],
    "operator.num_candidates": [2, 3, 9, 12],
    "operator.eval_candidates": ["same", "all", "resample"],
    "operator.pad_candidates": ["true", "false"],
    "operator.self_first": ["true", "false"],
    "operator.self_again": ["null", -0.1],
    "operator.score_step": ["null", 1e-4],
    "operator.slots": ["rank", "raster", "window"],
    "operator.weighting": ["ones", "softmax", "score", "softmax_far"],
    "operator.aggregation": ["conv", "depthwise", "separable", "sum", "max_relative", "edge", "sage", "gin"],
    "operator.causal": ["true", "false"],
    "operator.rank_step": [1, 2],
    "operator.token_dilation": [1, 2],
    "operator.grid_rounding": ["nearest", "floor", "sheared"],
    "operator.straight_through": ["true", "false"],
    "operator.learn_blend": ["no", "layer", "head"],
    "schedule": ["constant", "linear", "cosine"],
    "swap.init": ["fresh", "transfer"],
    "swap.first": [1, 2],
    "optim": ["adamw", "sgd"],
    "optim.sched": ["cosine", "constant"],
    "optim.clip_grad": [0.1, "null"],
    "train.eval_batch_size": ["null", 11, 64],
    "train.ema": ["null", 0.9],
    "train.label_smoothing": [0, 0.1],
    "train.mixup": [0, 0.5],
    "train.amp": ["off", "bf16"],
    "train.channels_last": ["false"],
    "train.deterministic": ["true", "false"],
    "train.max_steps": ["null", 2],
    "data.drop_last": ["true", "false"],
    "data.flip": ["true", "false"],
    "data.crop_padding": [0, 2],
    "data.val_fraction": [0, 0.2],
    "diagnostics.enabled": ["true", "false"],
    "seed": [0, 1, 2],
}


def overrides_of(number, folder):
    """One configuration: a data set, a backbone, an operator that fits it, and up to nine other choices."""
    rng = random.Random(number)
    name = rng.choice(list(BACKBONES))
    data = rng.choice(list(DATA))
    own = [*COMMON, *DATA[data], *BACKBONES[name]]
    own += [f"data.root={folder}"] if data == "folder" else []
    own += [f"swap=all_{'conv' if name == 'resnet' else 'attention'}"]
    own += [f"operator={rng.choice(CONV if name == 'resnet' else ATTENTION)}"]
    own += ["operator.k_policy=clamp"] if rng.random() < 0.7 else []
    own += [f"train.batch_size={rng.choice([7, 16, 20])}"]
    keys = rng.sample(sorted(CHOICES), rng.randint(1, 5))
    return own + [f"{key}={rng.choice(CHOICES[key])}" for key in keys]


@pytest.mark.slow
def test_two_hundred_runs(tmp_path, capsys):
    torch.set_num_threads(1)
    write_image_folder(tmp_path / "images", classes=("ant", "bee", "cow"), per_class=20)
    done, refused = [], []
    for number in range(200):
        folder, own = tmp_path / f"run{number}", overrides_of(number, tmp_path / "images")
        capsys.readouterr()
        try:
            result = run(compose_config([*own, f"run.dir={folder}"]))
            evaluate([f"run={folder}"])
        except ConfigError as error:  # any other exception fails, with the configuration in its traceback
            assert "\n" not in str(error).strip(), own
            refused.append((str(error), own))
            continue
        except Exception as error:
            raise AssertionError(f"{own}: {error!r}") from error
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (found["top1"], found["top5"]) == (result["top1_last"], result["top5_last"]), own
        done.append(folder)
    with capsys.disabled():
        print(f"{len(done)} trained, {len(refused)} refused:", *sorted({m for m, _ in refused}), sep="\n")
    assert len(done) > 100 and len({message for message, _ in refused}) > 5
    report([*(f"{folder}" for folder in done), f"out={tmp_path / 'report'}"])
    with (tmp_path / "report" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Of runs with one configuration a report shows one.
    own = {folder.name: json.loads((folder / "result.json").read_text())["fingerprint"] for folder in done}
    shown = [own[row["folder"].rsplit("/", 1)[-1]] for row in rows]
    assert sorted(shown) == sorted(set(own.values()))
