"""What is wrong with a run before torch, which takes many seconds to load, is needed to know."""

from __future__ import annotations

from pathlib import Path

from convnn.config.checks import check_kinds
from convnn.config.schema import Config, DataConfig
from convnn.data.folders import split_folders
from convnn.errors import ConfigError
from convnn.runs.folder import check_place, policy_of
from convnn.runtime.distributed import world_from_environment


def check_early(config: Config) -> None:
    """Check operators against the swap, the places of data, and the run folder if it is given.

    Raises:
        ConfigError: one line that names the key and the fix, as the run itself would say later.
    """
    check_kinds(config)
    if config.run.if_exists not in ("skip", "resume"):  # a complete run needs its data no more
        check_data_place(config.data)
    if config.run.dir and world_from_environment().rank == 0:  # whose folder the others would find begun
        path = Path(config.run.dir)
        check_place(path, policy_of(path, config.run.if_exists))


_CIFAR = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
}


def check_data_place(data: DataConfig) -> None:
    """Raise ConfigError where data is read from a folder that does not have it."""
    root = Path(data.root).expanduser()
    if data.target == "convnn.data.load_imagefolder":
        split_folders(root, data.val_folder)
    elif data.target == "convnn.data.load_cifar" and data.name in _CIFAR and not data.download:
        folder, archive, md5 = _CIFAR[data.name]
        if not (root / folder).exists() and not (root / archive).exists():
            raise ConfigError(
                f"data={data.name}: no files in {(root / folder).absolute()}, and data.download=false; "
                f"put {archive} (md5 {md5}) into {root.absolute()}, or set data.root"
            )
