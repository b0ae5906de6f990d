"""A run's model as a folder that others can take: safetensors or ONNX, config.json and a model card. No pickle."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from convnn.config.identity import is_own
from convnn.config.load import to_config
from convnn.config.schema import Config
from convnn.errors import CheckpointError, ConfigError, first_line
from convnn.models.backbones import create_backbone
from convnn.models.build import build_network, without_weights
from convnn.models.inspect import evaluating
from convnn.models.plain import timm_description
from convnn.models.sites import is_operator
from convnn.models.swap import export_layers, neighbor_layers
from convnn.runs.card import model_card
from convnn.runs.checkpoint import load_model_state
from convnn.runs.data_record import DataRecord
from convnn.runtime.device import pick_device
from convnn.runtime.files import read_json, write_json, write_text
from convnn.runtime.owned import Owner, naming
from convnn.train.finished import LoadedModel
from convnn.train.restore import Restored
from convnn.version import __version__

WEIGHTS, CONFIG, CARD, ONNX = "model.safetensors", "config.json", "README.md", "model.onnx"
MANIFEST = ".convnn-export"
_FORMAT = 1
_PRIVATE = ("run", "tracker", "diagnostics", "checkpoint", "device", "debug")
"""Sections and keys of a configuration that say where a run lay and how it was watched."""


def write_folder(found: Restored, config: Config, run: Path, checkpoint: str, out: Path, kind: str) -> dict[str, Any]:
    """Write a run's model to a folder of its own.

    Args:
        found: the run's model, which is changed.
        config: of the run.
        run: its folder.
        checkpoint: that was loaded, ``last`` or ``best``.
        out: the folder; other files in it stay.
        kind: ``safetensors``: the layers as they are; ``hf``: as the Hugging Face Hub has models, of plain timm where
            the layers stand at an end and timm has such a network; ``onnx``: a graph for other programs.

    Returns:
        ``plain``, whether timm alone loads it, and ``load``, how it is loaded.

    Raises:
        ConfigError: if a file there would be replaced that no export wrote, or a package is missing.
    """
    layers = _layers(found.model)
    model, described = found.model.eval(), None
    if kind == "hf":
        model, described = _plain(found, config)
    plain = described is not None
    load = _how_to_load(out, kind, plain)
    values = _description(found, config, described) | {"convnn": _own_values(found, config, run, checkpoint, plain)}
    library = "timm" if plain else "onnx" if kind == "onnx" else "convnn"
    usage = _usage(found, config, kind, plain)
    data = DataRecord.read(found.checkpoint) or DataRecord.read(read_json(run / "result.json"))
    card = model_card(run, config, data, layers, checkpoint=checkpoint, library=library, usage=usage)
    with Owner("export", MANIFEST, last=CONFIG).written_aside(out) as aside:
        with naming(aside / (ONNX if kind == "onnx" else WEIGHTS)):
            if kind == "onnx":
                _write_onnx(model, found, aside / ONNX)
            else:
                (aside / WEIGHTS).write_bytes(save(_tensors(model), metadata={"format": "pt"}))
        with naming(aside / CARD):
            write_text(aside / CARD, card)
        with naming(aside / CONFIG):
            write_json(aside / CONFIG, values)
    return {"plain": plain, "load": load, "layers": len(layers)}


def load_exported(folder: str | os.PathLike[str], *, device: str = "auto", trust_code: bool = False) -> LoadedModel:
    """Return the model of a folder that ``scripts/export.py format=safetensors|hf`` wrote; the run is not needed.

    Args:
        folder: with model.safetensors and config.json.
        device: that ``predict`` computes on, as ``device=`` of train.py; ``auto`` is settled here.
        trust_code: import the modules that config.json names besides convnn's and timm's own, which runs their code.

    Raises:
        ConfigError: if the folder is none of an export, names code that is not trusted, or there is no such device.
        CheckpointError: if the weights are damaged or do not fit.
    """
    place, chosen = Path(folder), str(pick_device(device))
    own = (read_json(place / CONFIG) or {}).get("convnn")
    if not isinstance(own, dict) or not isinstance(own.get("format"), int):
        raise ConfigError(f"{place} is no exported model: it has no {CONFIG} that scripts/export.py wrote")
    if own["format"] > _FORMAT:
        raise ConfigError(f"{place / CONFIG} has format {own['format']} of a newer convnn; update convnn")
    try:
        weights = load_file(place / WEIGHTS)
    except FileNotFoundError as error:
        raise ConfigError(f"{place} has no {WEIGHTS}; export with format=safetensors or format=hf") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{place / WEIGHTS} is damaged: {first_line(error)}") from error
    try:
        weightless = {"checkpoint": None, "checkpoint_sha256": None, "pretrained": False}  # no other file is looked at
        config = to_config(own["config"] | {"backbone": own["config"]["backbone"] | weightless})
        classes, shape, image_size = list(own["classes"]), list(own["shape"]), int(own["image_size"])
        if not trust_code:
            _check_code(config, place)
        config.device = chosen
        config.backbone = without_weights(config.backbone)  # no other file is read
        if own["plain"]:
            model = create_backbone(config.backbone, len(classes), shape[0], image_size)
        else:
            model = build_network(config, len(classes), shape)[0]
        step = int(own.get("step", 0))
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{place / CONFIG} is damaged: {type(error).__name__}: {error}") from error
    load_model_state(model, weights, place / WEIGHTS)
    for layer in neighbor_layers(model).values():
        layer.backend = "auto"  # a run that demanded kernels may be used without them
    return LoadedModel(place, config, model.eval(), classes, shape, image_size, step)


def _check_code(config: Config, place: Path) -> None:
    """Raise ConfigError if a configuration names code besides convnn's and timm's own."""
    rules = config.swap.effective_rules().values()
    targets = [config.operator.target, *(t for r in rules if (t := r.operator.get("target")))]
    foreign = [t for t in targets if not is_own(t)] if rules else []
    if config.backbone.module:
        foreign.append(config.backbone.module)
    if foreign:
        raise ConfigError(
            f"{place / CONFIG} names code that is not convnn's: {', '.join(foreign)}; if you trust it, "
            "call load_exported(..., trust_code=True)"
        )


def _layers(model: nn.Module) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return name, kind and place on the spectrum of each replaced layer."""
    names = [name for name, module in model.named_modules() if is_operator(module)]
    outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    found = []
    for name in outer:
        layer = model.get_submodule(name)
        spectrum = getattr(layer, "spectrum", None)
        found.append((name, type(layer).__name__, spectrum() if spectrum else {}))
    return found


def _plain(found: Restored, config: Config) -> tuple[nn.Module, dict[str, Any] | None]:
    """Return the model that plain timm has, with how timm builds it; the model as it is and None where it has none."""
    model = copy.deepcopy(found.model)
    try:
        export_layers(model)
    except ConfigError:
        return found.model, None
    described = timm_description(model, config.backbone, len(found.classes), found.shape[0], found.image_size)
    if described["differs"] or config.backbone.module:
        return found.model, None
    return model, described


def _description(found: Restored, config: Config, described: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what timm, and the Hub, read of config.json."""
    values: dict[str, Any] = {"architecture": config.backbone.name.partition(".")[0], "num_classes": len(found.classes)}
    if described is None:
        return values
    known = timm.get_pretrained_cfg(config.backbone.name)
    kept = ("first_conv", "classifier", "fixed_input_size")
    source = {key: value for key, value in known.to_dict().items() if key in kept} if known else {}
    cfg = {
        **source,
        "num_classes": len(found.classes),
        "input_size": [found.shape[0], found.image_size, found.image_size],
        "pool_size": None,
        "mean": config.data.mean,
        "std": config.data.std,
        "interpolation": config.data.interpolation,
        "crop_pct": config.data.crop_pct or 1.0,
        "custom_load": False,
    }
    names = {"label_names": found.classes}
    return values | {"model_args": described["kwargs"], **names, "pretrained_cfg": cfg}


def _own_values(found: Restored, config: Config, run: Path, checkpoint: str, plain: bool) -> dict[str, Any]:
    """Return what ``load_exported`` reads, without places of this machine."""
    values = {key: value for key, value in asdict(config).items() if key not in _PRIVATE}
    values["backbone"] = asdict(without_weights(config.backbone))
    values["data"] = {key: value for key, value in values["data"].items() if key != "root"}
    return {
        "format": _FORMAT,
        "version": __version__,
        "plain": plain,
        "run": run.name,
        "checkpoint": checkpoint,
        "step": found.checkpoint["step"],
        "image_size": found.image_size,
        "shape": found.shape,
        "classes": found.classes,
        "config": values,
    }


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's state; tensors that share memory, as tied weights do, each with their own."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}


def _write_onnx(model: nn.Module, found: Restored, path: Path) -> None:
    """Write a graph with an open number of images, and compare its logits with the model's where onnxruntime is.

    Raises:
        ConfigError: if a package is missing, or the graph gives other logits.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError("format=onnx needs onnx and onnxscript; install them (pip install convnn[onnx])") from error
    images = torch.randn(2, found.shape[0], found.image_size, found.image_size)
    batch = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    with evaluating(model):
        program = torch.onnx.export(
            model, (images,), dynamic_shapes=batch, dynamo=True, verbose=False,
            input_names=["images"], output_names=["logits"],
        )  # fmt: skip
        assert program is not None
        program.save(str(path), external_data=False)
        try:
            import onnxruntime
        except ImportError:
            return
        other = torch.randn(3, *images.shape[1:])
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        logits = torch.from_numpy(session.run(None, {"images": other.numpy()})[0])
        wanted = model(other)
    worst = (logits - wanted).abs().max().item()
    if not torch.allclose(logits, wanted, rtol=1e-3, atol=1e-3):
        raise ConfigError(f"format=onnx: onnxruntime gives other logits than the model, by up to {worst:.3g}")


def _how_to_load(out: Path | str, kind: str, plain: bool) -> str:
    if kind == "onnx":
        return f"onnxruntime.InferenceSession('{out}/{ONNX}')"
    return f"timm.create_model('local-dir:{out}', pretrained=True)" if plain else f"convnn.load_exported('{out}')"


def _usage(found: Restored, config: Config, kind: str, plain: bool) -> str:
    """Return the part of a card that says how the model is used, for a folder that is called DIR."""
    mean, std = ([round(value, 6) for value in values] for values in (config.data.mean, config.data.std))
    side, channels = found.image_size, found.shape[0]
    scaled = f"({channels}, {side}, {side}) scaled to 0..1, less {mean}, divided by {std}"
    lines: Sequence[str]
    if kind == "onnx":
        lines = [
            "import onnxruntime",
            "",
            f"session = onnxruntime.InferenceSession('DIR/{ONNX}')",
            "logits = session.run(None, {'images': images})[0]  # float32, any number of images",
        ]
    else:
        own = [
            "import convnn",
            "",
            "model = convnn.load_exported('DIR')  # DIR: this folder",
            "found = model.predict('photos/')  # or files, or a uint8 tensor",
            "names = [model.classes[c] for c in found.predicted]",
        ]
        by_timm = ["import timm", "", "model = timm.create_model('local-dir:DIR', pretrained=True).eval()", ""]
        lines = [*(by_timm if plain else []), *own]
    code = "\n".join(lines)
    return f"```python\n{code}\n```\n\nIt takes images of {scaled}; `config.json` has the classes."
