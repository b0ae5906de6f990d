"""Points of a sweep are those of their data: other data is told, data that moved is found."""

import shutil
from pathlib import Path

import pytest
from folder_runs import CHANGES, FOLDER, add_validation, remove_one, rename_class, write_pets
from helpers import TINY

from convnn.config.compose import compose_config
from convnn.errors import EXIT_CONFIG, ConfigError
from convnn.sweep import process
from convnn.sweep.options import SweepConfig
from convnn.sweep.plan import make_plan, read_plan
from convnn.sweep.sweep import run_sweep
from convnn.train.run import run

pytestmark = pytest.mark.long

GIVEN = [*TINY, *FOLDER]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Points train in this process, which is quicker; the fixture is the list of their commands."""
    commands = []

    def carry_out(command, *_):
        commands.append(command)
        given = [o for o in command[3:] if not o.startswith("tracker.group")]
        try:
            return run(compose_config(given))["exit_code"], "", None
        except ConfigError as error:
            return EXIT_CONFIG, f"error: {error}", None

    monkeypatch.setattr(process, "_run_command", carry_out)
    return commands


def sweep(folder, data, *more, root="pets"):
    given = [*GIVEN, f"data={data}", f"data.root={folder / root}", *more]
    return run_sweep([*given, f"sweep.dir={folder}/{data}", "sweep.report=false"])


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Two sweeps of one point, complete, without the programs around."""
    folder = tmp_path_factory.mktemp("first")
    write_pets(folder / "pets")
    return folder


@pytest.fixture
def finished(first, tmp_path, here):
    """A copy of them."""
    for data in ("imagenet", "imagefolder"):
        if not (first / data).exists():
            assert sweep(first, data) == 0
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    here.clear()
    return tmp_path


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.long
def test_complete_points_of_other_data_are_refused(change, finished, here):
    change(finished / "pets")
    plan = (finished / "imagenet" / "plan.json").read_bytes()
    for more in ([], ["sweep.dry_run=true"], ["seed=0,1"]):
        with pytest.raises(ConfigError) as error:
            sweep(finished, "imagenet", *more)
        assert CHANGES[change] in str(error.value) and "points/" in str(error.value)
    assert not here and (finished / "imagenet" / "plan.json").read_bytes() == plan


def test_the_same_data_is_skipped_and_read_once(finished, here, capsys, monkeypatch):
    from convnn.data import datasets

    reads, load = [], datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda config: reads.append(config.root) or load(config))
    assert sweep(finished, "imagenet") == 0
    assert "0 to run" in capsys.readouterr().out and not here and len(reads) == 1
    shutil.rmtree(finished / "pets")
    assert sweep(finished, "imagenet") == 0  # it cannot be told, which is said
    assert "0 to run" in capsys.readouterr().out and not here


@pytest.mark.parametrize("data", ["imagenet", "imagefolder"])
@pytest.mark.long
def test_points_of_data_that_moved_are_the_same(data, finished, here, capsys):
    names = [p["name"] for p in read_plan(finished / data)["points"]]
    for place in ("moved", "again"):
        shutil.copytree(finished / "pets", finished / place)
        assert sweep(finished, data, root=place) == 0
        assert "1 points (1 complete), 0 to run" in capsys.readouterr().out
        assert sweep(finished, data, root=place) == 0  # from plan.json alone
        assert "0 to run" in capsys.readouterr().out and not here
    assert [p["name"] for p in read_plan(finished / data)["points"]] == names
    (checkpoint,) = (finished / data).glob("points/*/checkpoints")
    (checkpoint.parent / "result.json").unlink()  # as if it had been stopped
    shutil.copytree(finished / "pets", finished / "third")
    assert sweep(finished, data, root="third") == 0
    assert len(here) == 1
    assert [p["name"] for p in read_plan(finished / data)["points"]] == names


def test_an_image_folder_of_other_content_is_another_point(finished, here):
    write_pets(finished / "others", ("cat", "wolf"))
    assert sweep(finished, "imagefolder", root="others") == 0
    assert len(here) == 1 and len(list((finished / "imagefolder" / "points").iterdir())) == 2


@pytest.mark.parametrize("change", [remove_one, rename_class, add_validation])
def test_roots_of_other_content_are_not_merged(change, tmp_path, capsys):
    change(write_pets(tmp_path / "b"))
    write_pets(tmp_path / "a")
    roots = f"data.root={tmp_path}/a,{tmp_path}/b"
    found = make_plan(SweepConfig(), [*GIVEN, "data=imagenet", roots])
    assert len(found.points) == 1 and not found.duplicates
    ((_, reason),) = found.invalid
    assert "hold other data" in reason and "give each a data.name of its own" in reason
    assert CHANGES[change] in reason
    with pytest.raises(ConfigError, match="1 points cannot work"):
        run_sweep([*GIVEN, "data=imagenet", roots, f"sweep.dir={tmp_path}/s"])
    assert not (tmp_path / "s").exists()


def test_roots_of_one_content_are_merged(tmp_path):
    for name in "ab":
        write_pets(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for other in ("b", "link"):
        found = make_plan(SweepConfig(), [*GIVEN, "data=imagenet", f"data.root={tmp_path}/a,{tmp_path}/{other}"])
        assert (len(found.points), found.duplicates, found.invalid) == (1, 1, [])
    found = make_plan(SweepConfig(), [*GIVEN, "data=imagenet", f"data.root={tmp_path}/a,{tmp_path}/none"])
    assert "no folder" in found.invalid[0][1]
    found = make_plan(SweepConfig(), [*TINY, f"data.root={tmp_path}/a,{tmp_path}/b"])  # synthetic: it has no files
    assert (len(found.points), found.duplicates) == (1, 1)


def test_names_of_their_own_tell_roots_apart(tmp_path):
    for name, classes in (("a", ("cat", "dog")), ("b", ("cat", "wolf"))):
        write_pets(tmp_path / name, classes)
    points = {name: [f"data.root={tmp_path}/{name}", f"data.name={name}"] for name in "ab"}
    assert len(make_plan(SweepConfig(points=points), [*GIVEN, "data=imagenet"]).points) == 2


def test_a_point_that_goes_on_compares_its_data(finished, here, capsys):
    (point,) = (finished / "imagenet" / "points").iterdir()
    (point / "result.json").unlink()
    remove_one(finished / "pets")
    assert sweep(finished, "imagenet") == 1
    assert "test: 8 -> 7 images" in capsys.readouterr().out and not (point / "result.json").exists()


def test_points_of_another_sweeper_are_compared(finished, here):
    from convnn.runs.data_record import RecordReader
    from convnn.sweep.same_data import check_point

    (point,) = make_plan(SweepConfig(), [*GIVEN, "data=imagenet", f"data.root={finished}/pets"]).points
    config = compose_config([*GIVEN, "data=imagenet", f"data.root={finished}/pets"])
    check_point(finished / "imagenet", point, config.data, RecordReader())
    rename_class(finished / "pets")
    with pytest.raises(ConfigError, match="the run lacks 'wolf'"):
        check_point(finished / "imagenet", point, config.data, RecordReader())
    assert Path(finished / "imagenet" / point.folder).is_dir()
