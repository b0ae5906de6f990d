"""Programs that read a run use it as it was trained: its configuration, its classes, its images, its draws."""

import json
import logging
import re

import pytest
import torch
import yaml
from folder_runs import CHANGES, copied, folder_config, remove_one, rename_class, swap_names, write_pets
from helpers import tiny
from PIL import Image
from training import stop_after

from convnn.cli.evaluate import evaluate
from convnn.cli.export import export
from convnn.cli.predict import predict
from convnn.cli.visualize import visualize
from convnn.config.load import load_config
from convnn.data.classes import class_order
from convnn.data.datasets import load_imagefolder
from convnn.errors import ConfigError
from convnn.train.evaluate import evaluate as evaluate_model
from convnn.train.finished import load_run as load_object
from convnn.train.restore import evaluate_run, load_run
from convnn.train.run import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose layer is a convolution by configuration, so that it can be exported."""
    folder = tmp_path_factory.mktemp("finished")
    write_pets(folder / "pets")
    given = ["operator=conv2d", "swap.init=transfer", "swap.last=1"]
    run(folder_config(folder / "pets", folder / "run", *given, data="imagenet"))
    return folder


def edit(where, key, value=None):
    """Set a key of config.yaml; without a value, remove it."""
    values = yaml.safe_load((where / "config.yaml").read_text())
    *path, leaf = key.split(".")
    section = values
    for name in path:
        section = section[name]
    if value is None:
        del section[leaf]
    else:
        section[leaf] = value
    (where / "config.yaml").write_text(yaml.safe_dump(values))


PROGRAMS = {
    "evaluate": lambda where, *more: evaluate([f"run={where}", "device=cpu", *more]),
    "export": lambda where, *more: export([f"run={where}", f"out={where}/out.pt", *more]),
    "visualize": lambda where, *more: visualize([f"run={where}", f"out={where}/drawn", *more]),
}


def refusal(program, where, *more):
    before = {path: path.read_bytes() for path in where.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError) as error:
        PROGRAMS[program](where, *more)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in where.rglob("*") if path.is_file()} == before
    return str(error.value)


# ------------------------------------------------------------------------------------------- configuration


EDITS = {
    "similarity": ({"operator.similarity": "dot"}, "operator.similarity: dot, in the run cosine"),
    "mean": ({"data.mean": [0.4, 0.4, 0.4]}, "data.mean: [0.4, 0.4, 0.4], in the run [0.485, 0.456, 0.406]"),
    "k": ({"operator.k": 25}, "operator.k: 25, in the run 9"),
    "eval_batch_size": ({"train.eval_batch_size": 3}, "train.eval_batch_size: 3, in the run None"),
    "seed": ({"seed": 3}, "seed: 3, in the run 0"),
    "no mean": (
        {"data.mean": None, "data.std": None},
        "data.mean: [0.5] by default, as it is missing, in the run [0.485, 0.456, 0.406]",
    ),
    "no slots": ({"operator.slots": None}, "operator.slots: rank by default, as it is missing, in the run raster"),
    "no last": ({"swap.last": None}, "swap.last: None by default, as it is missing, in the run 1"),
}
"""Keys and their values in config.yaml, None: removed; and what a refusal says."""


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", EDITS)
@pytest.mark.long
def test_an_edited_configuration_is_refused(name, program, finished, tmp_path):
    _, where = copied(finished, tmp_path)
    changes, said = EDITS[name]
    for key, value in changes.items():
        edit(where, key, value)
    text = refusal(program, where)
    assert said in text and f"{where}/config.yaml is not what the run was trained with" in text


def test_what_is_no_part_of_the_outcome_may_be_edited(finished, tmp_path, capsys):
    root, where = copied(finished, tmp_path)
    result = json.loads((where / "result.json").read_text())
    edit(where, "data.root", str(root.rename(tmp_path / "moved")))
    edit(where, "device", "cpu")
    edit(where, "operator.backend", "torch")
    edit(where, "data.workers", 0)
    edit(where, "train.skip_nonfinite")  # missing, but it was the default
    evaluate([f"run={where}"])
    scores = json.loads(capsys.readouterr().out)
    assert scores["top1"] == result["top1_last"] and scores["same_images"] is True


# ------------------------------------------------------------------------------------------- classes and images


@pytest.mark.parametrize("change", CHANGES)
def test_an_evaluation_is_of_the_runs_test_images(change, finished, tmp_path, capsys):
    root, where = copied(finished, tmp_path)
    change(root)
    if "test" not in CHANGES[change] and "lacks" not in CHANGES[change]:  # of other splits nothing is evaluated
        evaluate([f"run={where}", "device=cpu"])
        assert json.loads(capsys.readouterr().out)["images"] == 8
        return
    said = "the run lacks 'wolf'" if "lacks" in CHANGES[change] else CHANGES[change].split("; ")[-1]
    assert said in refusal("evaluate", where)


@pytest.mark.parametrize("program", PROGRAMS)
def test_other_class_names_are_refused(program, finished, tmp_path):
    root, where = copied(finished, tmp_path)
    rename_class(root)
    own = [] if program == "export" else [[]]  # export looks at data only where it is told to
    for more in (*own, [f"data_root={root}"]):
        assert "the run lacks 'wolf'; the data lacks 'dog'" in refusal(program, where, *more)
    write_pets(tmp_path / "three", ("cat", "dog", "owl"))
    assert "the run lacks 'owl'" in refusal(program, where, f"data_root={tmp_path}/three")


def test_data_that_is_gone_can_be_named(finished, tmp_path):
    root, where = copied(finished, tmp_path)
    root.rename(tmp_path / "moved")
    assert "if the data moved, name its place by data_root=DIR" in refusal("evaluate", where)
    said = refusal("evaluate", where, f"data_root={tmp_path}/nowhere")
    assert "nowhere" in said and "if the data moved" not in said


@pytest.mark.long
def test_each_program_says_what_it_needs_of_the_images(finished, tmp_path, capsys):
    root, where = copied(finished, tmp_path)
    remove_one(root)
    assert "test: 8 -> 7 images" in refusal("visualize", where)
    PROGRAMS["export"](where)  # which uses the names of the classes alone
    image = root / "test" / "dog" / "1.png"
    PROGRAMS["visualize"](where, f"image={image}")


def test_images_have_the_size_that_they_had_in_the_run(tmp_path, capsys):
    """The side is the median over all files, of which only the test images must be the run's."""
    root, where = write_pets(tmp_path / "pets"), tmp_path / "run"
    result = run(folder_config(root, where, "data.load_size=null"))
    for path in (root / "train").rglob("*.png"):
        Image.open(path).resize((40, 40)).save(path)
    evaluate([f"run={where}", "device=cpu"])
    assert json.loads(capsys.readouterr().out)["top1"] == result["top1_last"]
    assert load_run(load_config(where), where, "last").image_size == 12


def test_another_folder_is_evaluated_when_it_is_named(finished, tmp_path, capsys, caplog):
    root, where = copied(finished, tmp_path)
    remove_one(root)
    evaluate([f"run={where}", "device=cpu", f"data_root={root}"])
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == 7 and scores["same_images"] is False
    assert "test: 8 -> 7 images" in caplog.text
    caplog.clear()
    evaluate([f"run={where}", "device=cpu", f"data_root={write_pets(tmp_path / 'equal')}"])
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == 8 and scores["same_images"] is True and not caplog.text
    assert scores["top1"] == json.loads((where / "result.json").read_text())["top1_last"]


def backwards(config):
    """A folder's images with the classes the other way round."""
    dataset = load_imagefolder(config)
    return dataset.ordered_as(dataset.classes[::-1])


def test_classes_in_another_order_are_taken_by_name(finished, tmp_path, monkeypatch, caplog):
    root, where = copied(finished, tmp_path)
    first = evaluate_run(load_config(where), where, "last")
    monkeypatch.setattr("convnn.data.load_imagefolder", backwards)
    assert evaluate_run(load_config(where), where, "last") == first
    assert "another order; they are taken by name" in caplog.text
    dataset = load_run(load_config(where), where, "last").dataset
    assert dataset.classes == ["cat", "dog"] and dataset.test.labels.tolist() == [0] * 4 + [1] * 4
    swap_names(root)  # by name they are now other images
    with pytest.raises(ConfigError, match="test: other images"):
        evaluate_run(load_config(where), where, "last")
    assert class_order(["cat", "dog"], ["dog", "cat"], ("a", "b")) == [1, 0]


# ------------------------------------------------------------------------------------------- draws


RESAMPLE = [
    "operator.candidates=random", "operator.num_candidates=12", "operator.eval_candidates=resample", "operator.k=4",
    "train.epochs=2", "swap.first=3", "train.eval_batch_size=5", "data.size=192", "optim.lr=0.01",
]  # fmt: skip


@pytest.mark.parametrize("more", [(), ("data.val_fraction=0.25", "train.ema=0.5"), ("seed=5", "train.max_steps=7")])
@pytest.mark.long
def test_resampled_candidates_are_those_of_the_run(more, tmp_path):
    result = run(tiny(*RESAMPLE, *more, f"run.dir={tmp_path}/r"))
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    for checkpoint, epoch in (("last", -1), ("best", result["best_epoch"])):
        torch.manual_seed(99)
        scores = evaluate_run(load_config(tmp_path / "r"), tmp_path / "r", checkpoint)
        assert [scores[k] for k in ("loss", "top1", "top5")] == [
            rows[epoch][f"test_{k}"] for k in ("loss", "top1", "top5")
        ]


def test_resampled_candidates_change_with_run_and_step(tmp_path, monkeypatch):
    stop_after(monkeypatch, 3)
    run(tiny(*RESAMPLE, f"run.dir={tmp_path}/r"))
    found = load_run(load_config(tmp_path / "r"), tmp_path / "r", "last")
    from convnn.data.batches import Batches

    batches = Batches(found.dataset.test, 5, load_config(tmp_path / "r").data, found.image_size)
    losses = [evaluate_model(found.model, batches, seeds=seeds)[0] for seeds in ((0, 3), (0, 3), (1, 3), (0, 4))]
    assert losses[0] == losses[1] and len(set(losses)) == 3
    free = {evaluate_model(found.model, batches)[0] for _ in range(3)}
    assert len(free) == 3  # without seeds every evaluation draws anew


def test_the_messages_are_one_line(finished, tmp_path):
    root, where = copied(finished, tmp_path)
    remove_one(root)
    assert re.fullmatch(
        rf"run={where} was made with other data \(test: 8 -> 7 images\); put it back, or name the data to use with "
        r"data_root=DIR",
        refusal("evaluate", where),
    )


# ------------------------------------------------------------------------------------------- runs that have not ended


def test_an_unfinished_run_is_a_warning_wherever_it_is_used(tmp_path, monkeypatch, capsys, caplog):
    root, where = write_pets(tmp_path / "pets"), tmp_path / "run"
    stop_after(monkeypatch, 0)
    run(folder_config(root, where, "operator=conv2d", "swap.init=transfer", "swap.last=1", "train.epochs=3"))
    weights = r"the weights of its last checkpoint are those after 0 of 3 epochs \(step 0\)"
    programs = PROGRAMS | {"predict": lambda place: predict([f"run={place}", str(root / "test"), "device=cpu"])}
    for use in [*programs.values(), load_object]:
        caplog.clear()
        use(where)
        assert re.fullmatch(rf"{where} is interrupted; {weights}", "\n".join(caplog.messages))
        assert {record.levelno for record in caplog.records} == {logging.WARNING}
        assert "interrupted" not in capsys.readouterr().out
    (where / "result.json").unlink()
    load_object(where)
    assert "is unfinished; " in caplog.messages[-1]


def test_a_complete_run_is_none_until_it_is_extended(finished, tmp_path, caplog):
    _, where = copied(finished, tmp_path)
    for checkpoint in ("last", "best"):
        load_object(where, checkpoint=checkpoint)
    assert not caplog.messages
    config = load_config(where)
    config.train.extended_from = [{"epochs": config.train.epochs}]
    config.train.epochs += 2
    load_run(config, where, "last", splits=())
    assert re.search(rf"is unfinished; .* after {config.train.epochs - 2} of {config.train.epochs} ep", caplog.text)
