"""timm's pretrained weights where there is no network: an answer in seconds."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session

from convnn.errors import WeightsError, first_line

SECONDS = 5.0
"""That a place of weights may take to answer at all. Asked for a file, huggingface_hub would try for minutes."""
_FILES = ("model.safetensors", "pytorch_model.bin")


@contextmanager
def answering(name: str, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Ask whether the place of a model's pretrained weights answers; if not, take what timm has kept of them.

    Args:
        name: of the model.
        kwargs: of ``timm.create_model``; weights that these tell of are no matter of a network.

    Raises:
        WeightsError: if there is no answer, and nothing kept.
    """
    settings = timm.get_pretrained_cfg(name)
    told = {**(kwargs.get("pretrained_cfg_overlay") or {})}
    if settings is None or "pretrained_cfg" in kwargs or told.keys() & {"file", "state_dict", "source", "custom_load"}:
        yield
        return
    hub, url = (told.get(key, getattr(settings, key, None)) for key in ("hf_hub_id", "url"))
    place = constants.ENDPOINT if hub else url
    silence = None if constants.HF_HUB_OFFLINE or not place else _silence(place)
    if silence is None:
        yield
        return
    if not _kept(hub, url, told.get("hf_hub_filename", settings.hf_hub_filename)):
        raise WeightsError(f"no answer from where they are ({silence})")
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _silence(place: str) -> str | None:
    """Return why an address does not answer; None if it does, whatever it says."""
    found: list[str | None] = [f"silent for {SECONDS:g} s"]

    def ask() -> None:
        try:
            get_session().head(place, timeout=SECONDS)
            found[0] = None
        except Exception as error:  # whatever there is between here and there
            found[0] = first_line(error)

    asking = threading.Thread(target=ask, daemon=True)  # a name that nobody resolves knows no timeout
    asking.start()
    asking.join(SECONDS + 1)
    return found[0]


def _kept(hub: str | None, url: str | None, file: str | None) -> bool:
    """Return whether weights lie in the cache already."""
    if hub:
        repository, _, revision = hub.partition("@")
        names = (file,) if file else _FILES
        return any(isinstance(try_to_load_from_cache(repository, n, revision=revision or None), str) for n in names)
    return url is not None and (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file()
