"""Make data ready from files that are at hand, without a network: CIFAR archives, and archives of image folders."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import MISSING

from convnn.cli.program import path, run_program, script_options
from convnn.config.data_schema import DataConfig
from convnn.errors import ConfigError, first_line
from convnn.ops.settings import check_fields, number

USAGE = """
usage: uv run scripts/prepare_data.py source=FILE_OR_FOLDER [root=data] [folder=DIR [train=N] [test=N]]
       convnn-prepare-data source=FILE_OR_FOLDER ...     the same where convnn is installed

Makes data ready from files at hand, without a network:

  source=cifar-10-python.tar.gz                 for data=cifar10 (or cifar-100-python.tar.gz for data=cifar100)
  source=cifar-10-python.tar.gz folder=cifar3k train=2000 test=500
                                                a folder of image files for data=imagefolder, with as many of each class
  source=images.tar.xz folder=DIR [train=N]     an archive, or a folder, of train/CLASS, test/CLASS (and val/CLASS)

{options}
Exit codes: 0 done, 1 the disk refuses, 2 wrong arguments or files.
"""


@dataclass
class Options:
    """Arguments of this script."""

    source: str = path(MISSING)
    """Archive or folder. CIFAR's archives are known by their names and verified by their checksums."""
    root: str = path("data")
    """Folder of CIFAR's files, as ``data.root``."""
    folder: str | None = path()
    """Folder of image files to make; it must not be there yet."""
    train: int | None = number(None, 1)
    """So many training images, the same number of each class; null: all."""
    test: int | None = number(None, 1)
    """So many test images, likewise."""


_CIFAR = {"cifar-10-python.tar.gz": "cifar10", "cifar-100-python.tar.gz": "cifar100"}


def prepare(argv: list[str]) -> None:
    """Unpack, verify, write, and say how the data is used."""
    options: Options = script_options(Options, argv, USAGE)
    check_fields(options, "")
    source = Path(options.source)
    if not source.exists():
        raise ConfigError(f"source={source}: there is no such file or folder")
    folder = Path(options.folder) if options.folder else None
    if folder is not None and folder.exists():
        raise ConfigError(f"folder={folder} is there already; choose another one, or remove it")
    name = _CIFAR.get(source.name)
    if name is None and folder is None:
        known = " or ".join(_CIFAR)
        raise ConfigError(f"source={source} is not {known}; name the folder to make: folder=DIR")
    if name is not None:
        _install(source, Path(options.root), name)
        root = "" if options.root == "data" else f" data.root={options.root}"
        print(f"{name} is ready: uv run train.py data={name}{root}")
    if folder is None:
        if options.train or options.test:
            raise ConfigError("train and test are of a folder to make: set folder=DIR, or leave them out")
        return
    data = DataConfig(limit=options.train, limit_test=options.test)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        made = Path(aside) / "made"
        if name is not None:
            own = replace(data, name=name, target="convnn.data.load_cifar", root=options.root, download=False)
        else:
            below = _class_folders(source, Path(aside))
            target = "convnn.data.load_imagefolder"
            own = replace(data, name="imagefolder", target=target, root=str(below), stream="true")
        _write(own, made)
        made.rename(folder)
    counts = {split: sum(1 for _ in (folder / split).glob("*/*")) for split in ("train", "val", "test")}
    told = ", ".join(f"{count} {split}" for split, count in counts.items() if count)
    print(f"{told} images: data=imagefolder data.root={folder}")


def _install(source: Path, root: Path, name: str) -> None:
    """Put CIFAR's archive where it is looked for, and unpack and verify it."""
    from convnn.data.datasets import load_cifar

    root.mkdir(parents=True, exist_ok=True)
    archive = root / source.name
    if not archive.exists():
        shutil.copyfile(source, archive.with_name(f".{archive.name}"))
        archive.with_name(f".{archive.name}").replace(archive)
    load_cifar(DataConfig(name=name, root=str(root), download=False))


def _class_folders(source: Path, aside: Path) -> Path:
    """Return the folder of an archive's, or a folder's, ``train`` and ``test``."""
    unpacked = source
    if source.is_file():
        unpacked = aside / "unpacked"
        unpacked.mkdir()
        try:
            if zipfile.is_zipfile(source):
                with zipfile.ZipFile(source) as archive:
                    archive.extractall(unpacked)  # which leaves no path outside
            else:
                with tarfile.open(source) as archive:
                    archive.extractall(unpacked, filter="data")
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
            raise ConfigError(f"source={source} cannot be unpacked: {first_line(error)}") from error
    for place in (unpacked, *(entry for entry in sorted(unpacked.iterdir()) if entry.is_dir())):
        if (place / "train").is_dir():
            return place
    raise ConfigError(f"source={source} has no folder train/CLASS, at its top or one below")


def _write(data: DataConfig, made: Path) -> None:
    """Write the images of a data set as ``train/CLASS/*`` and ``test/CLASS/*``: files as they are, pixels as PNG."""
    import os

    from PIL import Image

    from convnn.data.datasets import load_dataset

    dataset = load_dataset(data)
    for name, limit in (("train", data.limit), ("test", data.limit_test)):
        if limit is not None and limit < len(dataset.classes):
            raise ConfigError(f"{name}={limit} is less than the {len(dataset.classes)} classes; raise it")
    for name, split in (("train", dataset.train), ("val", dataset.val), ("test", dataset.test)):
        if split is None:
            continue
        labels = split.labels.tolist()
        for label in set(labels):
            (made / name / dataset.classes[label]).mkdir(parents=True)
        for i, label in enumerate(labels):
            place = made / name / dataset.classes[label]
            if split.paths is not None:
                file = Path(os.fsdecode(split.paths[i]))
                shutil.copyfile(file, place / f"{i:05}{file.suffix.lower()}")
            else:
                pixels = split.images[i].permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(place / f"{i:05}.png")


def main() -> None:
    """Run the program."""
    run_program(prepare)


if __name__ == "__main__":
    main()
