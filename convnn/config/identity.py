"""What makes two runs the same run: identity, fingerprint and name. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from convnn.config.schema import KERNEL, SMALL_IMAGE, Config

FIRST_NAMES = {
    "convnn.ACmix2d": "convnn.peers.ACmix2d",
    "convnn.ConvNN2d": "convnn.layers.ConvNN2d",
    "convnn.ConvNNAttention": "convnn.attention.ConvNNAttention",
    "convnn.GatedPositionalAttention": "convnn.peers.GatedPositionalAttention",
    "convnn.HybridConvNN2d": "convnn.hybrid.HybridConvNN2d",
    "convnn.HybridConvNNAttention": "convnn.hybrid.HybridConvNNAttention",
}
"""The operators as version 0.1 named them. Identities keep these names: the fingerprint of a configuration, and with
it the name of its run folder and its place in a sweep's plan, must not change when a class moves."""

NO_SPECTRUM = ("convnn.ACmix2d", "convnn.GatedPositionalAttention")
"""Operators without blend, k and temperature."""

_DEFAULT = Config()
NOT_IDENTITY = ("run", "tracker", "diagnostics", "checkpoint", "device", "debug")
"""Sections and keys that decide nothing about a run's outcome."""


def identity(config: Config) -> dict[str, Any]:
    """Return what decides the outcome of a run: all but where it is kept, watched and computed, and by what."""
    return identity_of(asdict(config))


def identity_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``identity`` from the plain values of a whole configuration, as a run folder's config.yaml has them."""
    kept = {key: value for key, value in values.items() if key not in NOT_IDENTITY}
    unused = {"download", "stream", "workers", "prefetch"}
    if values["data"]["name"] != "imagefolder":
        unused.add("root")
    if values["data"].get("val_fraction"):  # beside images held out, a validation folder is left out or refused
        unused.add("val_folder")
    own = {"data": unused, "operator": {"backend"}, "train": {"log_every"}}
    kept |= {group: {k: v for k, v in values[group].items() if k not in own[group]} for group in own}
    for section in fields(Config):
        if section.name in kept and is_dataclass(getattr(_DEFAULT, section.name)):
            kept[section.name] = _without_new_defaults(kept[section.name], getattr(_DEFAULT, section.name))
    kept["operator"] = _first_named(kept["operator"])
    kept["swap"] = kept["swap"] | {"operator": _first_named(kept["swap"]["operator"])}
    kept["backbone"], kept["swap"]["init"] = kept["backbone"] | {"stem": _stem(values)}, _init(values)
    if kept["backbone"].get("checkpoint_sha256"):  # which says what the file is, wherever it lies
        del kept["backbone"]["checkpoint"]
    kept["swap"]["rules"] = {
        name: rule | {"operator": _first_named(rule.get("operator", {}))}
        for name, rule in kept["swap"]["rules"].items()
    }
    return kept


_SIDES = {"convnn.data.load_cifar": 32, "convnn.data.load_digits": 8, "convnn.data.load_synthetic": 32}


def known_side(values: Mapping[str, Any]) -> int | None:
    """Return the side in pixels of the images that the network will see, from the plain values of a configuration.

    None if only the data can tell.
    """
    data, target = values["data"], values["data"]["target"]
    own = data["load_size"] if target in ("convnn.data.load_imagefolder", "convnn.data.load_synthetic") else None
    found: int | None = data["image_size"] or values["backbone"]["image_size"] or own or _SIDES.get(target)
    return found


def _stem(values: Mapping[str, Any]) -> str:
    """Return the stem that ``auto`` means, so that it is the same run as one that names it; ``auto`` if unknown."""
    stem, side = values["backbone"]["stem"], known_side(values)
    if stem != "auto" or side is None:
        return str(stem)
    return "small" if side < SMALL_IMAGE else "default"


def loads_weights(backbone: Mapping[str, Any]) -> bool:
    """Return whether a backbone starts from weights of a file."""
    return bool(backbone["pretrained"] or backbone.get("checkpoint") or "checkpoint_path" in backbone["kwargs"])


def _init(values: Mapping[str, Any]) -> str:
    """Return the initial weights that ``auto`` means, likewise; beside loaded weights it means what it says."""
    init = values["swap"]["init"]
    return "fresh" if init == "auto" and not loads_weights(values["backbone"]) else str(init)


def _without_new_defaults(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return a section's values less those of fields declared ``later`` that stand at their default."""
    new = {f.name: getattr(default, f.name) for f in fields(default) if "later" in f.metadata}
    return {name: value for name, value in values.items() if name not in new or value != new[name]}


def _first_named(operator: Mapping[str, Any]) -> dict[str, Any]:
    """Return operator settings whose target, if they have one, bears its first name."""
    target = {"target": FIRST_NAMES.get(operator["target"], operator["target"])} if "target" in operator else {}
    return {**operator, **target}


def effect(config: Config) -> dict[str, Any]:
    """Return the identity less what has no effect: runs that are alike in it train the same network alike.

    Without a swap no operator counts and no schedule moves; a scheduled blend or temperature is not the operator's own;
    all candidates need no number of them.
    """
    kept = identity(config)
    schedule = {
        name: track if track["shape"] != "constant" else {"shape": "constant"}
        for name, track in kept["schedule"].items()
    }
    if not config.swap.effective_rules():
        return {key: value for key, value in kept.items() if key not in ("operator", "swap", "schedule")}
    unused = {name for name in ("blend", "temperature") if schedule[name]["shape"] != "constant"}
    if kept["operator"]["candidates"] == "all" and not any(r.operator for r in config.swap.effective_rules().values()):
        unused.add("num_candidates")
    if config.operator.target in NO_SPECTRUM and not any(r.operator for r in config.swap.effective_rules().values()):
        unused |= {"blend", "k", "temperature"}
    targets = [config.operator.target, *(r.operator.get("target") for r in config.swap.effective_rules().values())]
    if not all(target is None or is_own(target) for target in targets):  # what others make of a setting is not known
        unused = set()
    operator = {key: value for key, value in kept["operator"].items() if key not in unused}
    return kept | {"schedule": schedule, "operator": operator}


def is_own(target: str) -> bool:
    """Return whether an operator is convnn's, under its present name or its first."""
    return target in FIRST_NAMES or target in FIRST_NAMES.values()


def fingerprint(config: Config) -> str:
    """Return a hash of ``identity(config)``, 16 hexadecimal digits."""
    return fingerprint_of(identity(config))


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """Return the hash of what ``identity`` or ``identity_of`` returned, 16 hexadecimal digits."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def without_place(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity without the folder of its data, for runs of which it is known what the data was.

    Of image folders the place is part of the identity, and so of the fingerprint and the run folder's name, which are
    needed before data is read. What the data was is in ``convnn.runs.data_record``: a folder that moved is the same.
    """
    return {**identity, "data": {key: value for key, value in identity["data"].items() if key != "root"}}


LENGTH = ("epochs", "max_steps")
"""Keys of ``train`` that say how long a run is."""


def length_of(train: Mapping[str, Any]) -> dict[str, int]:
    """Return how long a run is planned to be, from the values of ``train``, as ``train.extended_from`` has it."""
    return {key: train[key] for key in LENGTH if train.get(key) is not None}


def lengthened(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of a run as it is once the run has the length of ``new``.

    That is ``old`` itself unless ``new`` was extended from it, perhaps several times: a checkpoint of before an
    extension is one of the extended run.
    """
    before, after = ([*one["train"].get("extended_from", []), length_of(one["train"])] for one in (old, new))
    if after[: len(before)] != before:
        return dict(old)
    moved = (*LENGTH, "extended_from")
    kept = {key: value for key, value in old["train"].items() if key not in moved}
    return {**old, "train": kept | {key: new["train"][key] for key in moved if key in new["train"]}}


def differing(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the leaves in which two nested mappings differ: by dotted key the old and the new value."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key, "(missing)"), new.get(key, "(missing)")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differing(a, b, f"{prefix}{key}.")
        elif a != b:
            found[f"{prefix}{key}"] = (a, b)
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return ``key: old -> new`` for each leaf in which two nested mappings differ."""
    return [f"{key}: {a} -> {b}" for key, (a, b) in differing(old, new).items()]


def run_name(config: Config) -> str:
    """Return the readable part of the run folder's name, such as ``resnet18-convnn-k9-b1-s0``."""
    if config.run.name:
        return config.run.name
    parts = [config.backbone.name]
    if config.swap.effective_rules():
        o = config.operator
        parts += [o.name, o.k if o.k == KERNEL else f"k{o.k}", f"b{o.blend:g}"]
        if o.branch_ratio is not None:
            parts.append(f"r{o.branch_ratio:g}")
    parts.append(f"s{config.seed}")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts))[:80]
