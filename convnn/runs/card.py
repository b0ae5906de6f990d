"""The model card of an exported run: what it was trained on, how, with which seeds, and how well. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from convnn.config.identity import identity
from convnn.config.load import load_config
from convnn.config.overrides import PLACES, key_of
from convnn.config.schema import Config
from convnn.errors import ConfigError
from convnn.runs.data_record import DataRecord
from convnn.runs.record import read_result
from convnn.runs.status import COMPLETE
from convnn.runtime.files import read_json
from convnn.stats.paired import mean_interval
from convnn.stats.proportions import wilson_interval
from convnn.text import Score, command_line, markdown_table

_LICENCES = {
    "convnn.data.load_digits": "CC BY 4.0 (Optical Recognition of Handwritten Digits, UCI Machine Learning Repository)",
    "convnn.data.load_synthetic": "none needed: convnn computes the images",
}
_RECIPE = (
    "optim.name", "optim.lr", "optim.weight_decay", "optim.sched", "optim.warmup_epochs", "train.epochs",
    "train.max_steps", "train.batch_size", "train.label_smoothing", "train.mixup", "train.cutmix", "train.ema",
    "train.amp", "data.flip", "data.crop_padding", "data.rand_augment", "data.random_erasing", "backbone.name",
    "backbone.pretrained", "backbone.checkpoint_sha256", "operator.name", "swap.init", "seed",
)  # fmt: skip
"""Keys of a card's table; those without a value are left out."""


def model_card(
    folder: Path,
    config: Config,
    data: DataRecord | None,
    layers: Sequence[tuple[str, str, Mapping[str, Any]]],
    *,
    checkpoint: str,
    library: str,
    usage: str,
) -> str:
    """Return the text of README.md: YAML that the Hugging Face Hub reads, and Markdown.

    Args:
        folder: of the run.
        config: of the run.
        data: what the run was made with; None: not known.
        layers: name, kind, and blend, k and temperature of each replaced layer.
        checkpoint: ``last`` or ``best``.
        library: that loads the files.
        usage: Markdown that says how.
    """
    result, environment = read_result(folder) or {}, read_json(folder / "env.json") or {}
    top1, how = _accuracy(result, checkpoint)
    images = data.images if data else {}
    card: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "image-classification",
        "tags": ["convnn", "image-classification"],
    }
    if top1 is not None:
        name = config.data.name
        metric = {"type": "accuracy", "name": "top-1 accuracy in percent", "value": top1}
        task = {"type": "image-classification"}
        found = {"task": task, "dataset": {"name": name, "type": name}, "metrics": [metric]}
        card["model-index"] = [{"name": folder.name, "results": [found]}]
    parts = [
        f"---\n{yaml.safe_dump(card, sort_keys=False).rstrip()}\n---",
        f"# {folder.name}",
        f"{config.backbone.name} trained by [convnn](https://arxiv.org/abs/2511.14137), {_layers_line(layers)}.",
        usage,
        "## Accuracy",
        _accuracy_lines(top1, how, images.get("test"), *_seeds(folder, config)),
        "## Data",
        _data_lines(config, data),
        "## Recipe",
        markdown_table(("key", "value"), [(key, str(value)) for key, value in _recipe(config)]),
        "The whole configuration is in `config.json`." + _command(environment.get("command")),
        "## Where it comes from",
        _origin(environment, checkpoint, result),
    ]
    if layers:
        rows = [(name, kind, *(_cell(moved.get(key)) for key in ("blend", "k", "temperature")))
                for name, kind, moved in layers]  # fmt: skip
        parts += ["## Replaced layers", markdown_table(("layer", "kind", "blend", "k", "temperature"), rows)]
    return "\n\n".join(parts) + "\n"


def _layers_line(layers: Sequence[tuple[str, str, Mapping[str, Any]]]) -> str:
    if not layers:
        return "no layer replaced"
    blends = sorted({moved["blend"] for _, _, moved in layers if moved.get("blend") is not None})
    span = "" if not blends else f" at blend {' to '.join(f'{b:g}' for b in dict.fromkeys((blends[0], blends[-1])))}"
    plural = "layers" if len(layers) > 1 else "layer"
    return f"with {len(layers)} {plural} replaced{span} (0: neighbours by position, 1: by similarity of features)"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:g}"


def _accuracy(result: Mapping[str, Any], checkpoint: str) -> tuple[float | None, str]:
    """Return the test accuracy in percent of a checkpoint, and how the checkpoint was chosen; None: not known."""
    if result.get("status") != COMPLETE:
        return None, "the run has not ended"
    if checkpoint == "last":
        return result["top1_last"], "in the last epoch"
    if result.get("top1_at_best_val") is not None:
        return result["top1_at_best_val"], "in the epoch of the best validation accuracy"
    return result.get("top1_best_on_test"), "in the epoch that is best on these very images, which flatters it"


def _accuracy_lines(top1: float | None, how: str, images: int | None, seeds: list[int], values: list[float]) -> str:
    if top1 is None:
        return f"Not known: {how}."
    line = f"{top1:.2f} % top-1 on the test images, {how}."
    if images:
        low, high = wilson_interval(round(top1 / 100 * images), images)
        line = (
            f"{top1:.2f} % top-1 on {images:,} test images, {how}; 95 % interval {100 * low:.2f} to {100 * high:.2f} "
            "(Wilson's, over images: this model on new images of this kind)."
        )
    if len(values) > 1:
        mean, std, n = score = Score.of(values)
        low, high = (min(max(end, 0.0), 100.0) for end in mean_interval(mean, std, n))
        line += (
            f"\n\nOver seeds, last epochs: {score}, 95 % interval of the mean {low:.2f} to {high:.2f} (t); "
            f"seeds {', '.join(map(str, seeds))}."
        )
    else:
        line += "\n\nOne seed: how much the accuracy varies with it is not known."
    return line


def _seeds(folder: Path, config: Config) -> tuple[list[int], list[float]]:
    """Return the seeds of a sweep's complete runs that differ from one in nothing else, and their accuracies."""
    if folder.resolve().parent.name != "points":
        return [], []
    own, found = _seedless(config), {}
    for place in sorted(folder.resolve().parent.iterdir()):
        result = read_result(place)
        if result is None or result["status"] != COMPLETE:
            continue
        try:
            other = load_config(place)
        except ConfigError:
            continue
        if _seedless(other) == own:
            found[other.seed] = float(result["top1_last"])
    seeds = sorted(found)
    return seeds, [found[seed] for seed in seeds]


def _seedless(config: Config) -> dict[str, Any]:
    kept = identity(config)
    data = {key: value for key, value in kept["data"].items() if key != "root"}
    return {key: value for key, value in kept.items() if key != "seed"} | {"data": data}


def _data_lines(config: Config, data: DataRecord | None) -> str:
    licence = _LICENCES.get(config.data.target, "not known")
    if config.data.name == "imagenet":
        licence = "ImageNet's terms of access (image-net.org/download): research and education, not commercial"
    lines = [f"- data set: {config.data.name}", f"- licence of the data: {licence}"]
    if data is not None:
        counts = ", ".join(f"{count:,} {name}" for name, count in data.images.items())
        hashes = ", ".join(f"{name} `{digest}`" for name, digest in data.content.items())
        lines += [f"- images: {counts}", f"- hash of labels and images: {hashes}", f"- classes: {_few(data.classes)}"]
        if data.shape:
            lines.append("- size: " + " x ".join(map(str, data.shape)) + " (channels, rows, columns)")
    return "\n".join(lines)


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more (`config.json` has all)"


def _recipe(config: Config) -> list[tuple[str, Any]]:
    rows = []
    for key in _RECIPE:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if value is not None and value != "":
            rows.append((key, value))
    return rows


def _command(given: Any) -> str:
    """Return the command that trained a run, without the places of the machine where it did."""
    if not isinstance(given, list):
        return ""
    if {key_of(arg) for arg in map(str, given)} & {"resume", "from_run", "backbone.checkpoint"}:
        return ""  # which goes on from something that lies on that machine
    kept = [arg for arg in map(str, given) if not _is_local(arg)]
    return f" It was trained by\n\n    {command_line(['train.py', *kept])}"


def _is_local(arg: str) -> bool:
    key = key_of(arg)
    value = arg.partition("=")[2].strip("'\"")
    own = key in (*PLACES, "run.name", "run.if_exists")
    return own or arg.startswith("-") or key.startswith(("tracker", "hydra")) or bool(re.match(r"[/~]", value))


def _origin(environment: Mapping[str, Any], checkpoint: str, result: Mapping[str, Any]) -> str:
    commit = environment.get("git_commit")
    changed = ", with changes that were not committed" if environment.get("git_dirty") else ""
    versions = environment.get("versions") or {}
    lines = [
        f"- commit of convnn: {f'`{commit}`{changed}' if commit else 'not known'}",
        f"- checkpoint: {checkpoint}",
        f"- fingerprint of the configuration: {result.get('fingerprint', 'not known')}",
        f"- versions: {', '.join(f'{name} {v}' for name, v in versions.items()) or 'not known'}",
        f"- device: {environment.get('device', 'not known')}",
    ]
    return "\n".join(lines)
