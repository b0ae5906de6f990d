"""Small runs on image folders, of which each test gets its own copy."""

import shutil

from helpers import tiny, write_image_folder

FOLDER = [
    "data.load_size=8",
    "train.batch_size=8",
    "train.epochs=1",
    "swap.last=1",
    "diagnostics.enabled=false",
]


def folder_config(root, where, *overrides, data="imagefolder"):
    """Compose a run of one epoch on the images of a folder."""
    return tiny(f"data={data}", f"data.root={root}", *FOLDER, f"run.dir={where}", *overrides)


def write_pets(root, classes=("cat", "dog")):
    """Write 16 images to train on and 8 to test on."""
    write_image_folder(root, classes, per_class=8)
    for name in classes:
        for i in range(4, 8):
            (root / "test" / name / f"{i}.png").unlink()
    return root


def copied(finished, tmp_path):
    """Copy a folder with ``pets`` and ``run`` in it, so that the copied run is of the copied pets; return both."""
    for name in ("pets", "run"):
        shutil.copytree(finished / name, tmp_path / name)
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace(str(finished), str(tmp_path)))
    return tmp_path / "pets", tmp_path / "run"


def remove_one(root):
    """Delete a test image."""
    (root / "test" / "cat" / "0.png").unlink()


def rename_class(root):
    """Call the dogs wolves, which stays the second class."""
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / "wolf")


def swap_names(root):
    """Let cats and dogs change names, so that the same files bear other labels."""
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / "x")
        (root / split / "cat").rename(root / split / "dog")
        (root / split / "x").rename(root / split / "cat")


def grow_one(root):
    """Change the size of a training image's file."""
    path = root / "train" / "dog" / "3.png"
    path.write_bytes(path.read_bytes() + b"x")


def add_validation(root):
    """Add a validation set."""
    shutil.copytree(root / "test", root / "val")


CHANGES = {
    remove_one: "test: 8 -> 7 images",
    rename_class: "the run lacks 'wolf'; the data lacks 'dog'",
    swap_names: "train: other images; test: other images",
    grow_one: "train: other images",
    add_validation: "val: 0 -> 8 images",
}
"""What is done to a folder, and what a refusal says of it."""
