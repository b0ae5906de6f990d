"""CIFAR-10 and CIFAR-100: torchvision's files, unpacked once however many processes ask for them."""

from __future__ import annotations

import logging
import shutil
import tarfile
import warnings
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from convnn.config.schema import DataConfig
from convnn.data.splits import Dataset, Split
from convnn.errors import ConfigError, first_line
from convnn.runtime.locks import Lock, lock, lock_owner, release

log = logging.getLogger("convnn")
WAIT = 1800.0
"""Seconds that a process waits for another one that downloads and unpacks."""

_ASIDE = ".unpacking-"


def load_cifar(config: DataConfig) -> Dataset:
    """Load CIFAR-10 or CIFAR-100 (``config.name``) through torchvision, which downloads and verifies its files.

    Raises:
        ConfigError: if the files are missing or damaged and cannot be fetched.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    kinds: dict[str, Any] = {"cifar10": CIFAR10, "cifar100": CIFAR100}
    if config.name not in kinds:
        raise ConfigError(f"data.name={config.name} is not one of {', '.join(kinds)}, which data.target reads")
    kind = kinds[config.name]
    root = Path(config.root).expanduser()
    try:
        try:
            parts = [kind(root, train=train) for train in (True, False)]
        except RuntimeError:  # files are missing or damaged
            _unpack(kind, root, config.download)
            parts = [kind(root, train=train) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, ValueError, tarfile.TarError) as error:
        raise ConfigError(
            f"data={config.name}: no valid files in {(root / kind.base_folder).absolute()} and no download "
            f"({first_line(error)}); put {kind.filename} (md5 {kind.tgz_md5}) into {root.absolute()}, or set data.root"
        ) from error
    train, test = (
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return Dataset(train, test, list(parts[1].classes))


def _unpack(kind: Any, root: Path, download: bool) -> None:
    """Download the archive if need be, unpack it aside and move its files in place, each in one step.

    Of several processes one does it, the others wait. So no process sees half a file, also where one is killed.
    """
    from torchvision.datasets.utils import check_integrity, download_url, extract_archive

    archive, folder, existed = root / kind.filename, root / kind.base_folder, root.exists()
    if not download and not archive.exists():
        raise RuntimeError(f"no {archive.name}, and data.download=false")
    root.mkdir(parents=True, exist_ok=True)
    guard = root / f".{archive.name}.lock"
    held = _hold(guard, archive)
    try:
        files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
        if all(check_integrity(folder / name, md5) for name, md5 in files):  # another process was first
            return
        if download:
            download_url(kind.url, root, archive.name, kind.tgz_md5)  # nothing where the archive is whole
        elif not check_integrity(archive, kind.tgz_md5):
            raise RuntimeError(f"{archive.name} is damaged, and data.download=false")
        folder.mkdir(exist_ok=True)
        for left in folder.glob(f"{_ASIDE}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with TemporaryDirectory(prefix=_ASIDE, dir=folder) as aside, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            extract_archive(archive, aside)
            for name, _ in files:
                (Path(aside) / kind.base_folder / name).replace(folder / name)
    finally:
        guard.unlink(missing_ok=True)
        release(held)
        with suppress(OSError):
            if archive.exists() and archive.stat().st_size == 0:  # of a download that failed
                archive.unlink()
            if not existed:
                root.rmdir()  # refused where something is in it


def _hold(guard: Path, archive: Path) -> Lock:
    """Lock the file ``guard``, which its owner removes in the end."""
    while True:
        held = lock(guard)
        if held is None:
            log.info("waiting for %s to unpack %s", lock_owner(guard), archive)
            held = lock(guard, wait=WAIT)
        if held is None:
            raise RuntimeError(f"{lock_owner(guard)} has been unpacking {archive.name} for {WAIT / 60:.0f} minutes")
        if held.is_of(guard):
            return held
        held.close()  # what was locked is no longer the file of this name
