"""Typed configuration: one dataclass per group of ``conf/``, and the checks that no type can express.

Nothing here imports torch, so that a mistake in a command shows within a second.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

CONV, ATTENTION = "conv", "attention"


class ConfigError(ValueError):
    """A configuration that cannot work. The message is one line that names the key and the way out."""


@dataclass
class BackboneConfig:
    """The network, from timm's registry, before any layer is swapped."""

    name: str = "resnet18"
    """Name in timm's registry, see ``timm.list_models()``."""
    module: str | None = None
    """Python module to import first, for models registered outside timm with ``timm.models.register_model``."""
    pretrained: bool = False
    """Load timm's pretrained weights (needs a network or a filled cache)."""
    stem: str = "default"
    """``default``, or ``small``: 3x3 stride-1 first convolution without max-pooling, for images below 64 pixels."""
    image_size: int | None = None
    """Side in pixels that images are resized to; null keeps the size of the data set."""
    patch_size: int | None = None
    """Side of a ViT patch in pixels; null keeps timm's."""
    pos_embed: str = "learned"
    """``learned``, or ``sincos``: fixed sine-cosine positions (ViT only)."""
    drop_rate: float = 0.0
    """Dropout before the classifier, and in the blocks of a ViT."""
    drop_path_rate: float | None = None
    """Stochastic depth; null leaves timm's default and supports models without it."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to ``timm.create_model`` as they are."""


@dataclass
class OperatorConfig:
    """The neighbour-aggregation operator that takes the place of a layer (see docs/operators.md)."""

    name: str = "convnn"
    """Label in run names and reports."""
    kind: str = CONV
    """Kind of layer that it replaces: ``conv`` or ``attention``."""
    target: str = "convnn.layers.ConvNN2d"
    """Class with a ``from_layer(layer, config, init, site)`` constructor."""
    k: int = 9
    """Neighbours per query."""
    k_policy: str = "error"
    """When k exceeds the candidates: ``error``, or ``clamp`` to all of them (the first weight slots stay in use)."""
    blend: float = 1.0
    """0 selects neighbours by position (convolution), 1 by features (attention), between by both."""
    similarity: str = "cosine"
    """Of features: ``cosine``, ``euclidean`` (negative squared distance) or ``dot`` (scaled by 1/sqrt(d))."""
    distance: str = "chebyshev"
    """Of positions: ``chebyshev`` or ``euclidean``, in pixels or tokens."""
    candidates: str = "all"
    """Tokens that may be chosen: ``all``, ``random`` (num_candidates of them) or ``grid`` (num_candidates per side)."""
    num_candidates: int = 32
    """Number of random candidates, or side of the candidate grid."""
    eval_candidates: str = "same"
    """Random candidates at evaluation: ``same`` (one fixed seeded subset), ``all`` or ``resample`` (as the paper)."""
    candidate_seed: int = 0
    """Seed of the fixed subset."""
    pad_candidates: bool = True
    """Zero-padding tokens may be chosen at blend = 1 (below 1 they always may, as a convolution sees them)."""
    self_first: bool = True
    """The query's own token is always its first neighbour."""
    slots: str = "rank"
    """Weight slot of a neighbour: ``rank`` (best first), ``raster`` (by position, as kernel taps) or ``window``
    (a neighbour inside the kernel window meets its own tap, the others fill the free taps, best first)."""
    weighting: str = "ones"
    """``ones`` or ``softmax`` of the neighbours' feature similarity divided by the temperature."""
    temperature: float = 1.0
    """Divides the similarity before the softmax."""
    aggregation: str = "conv"
    """``conv`` (full or grouped weights per slot), ``depthwise`` (one weight per slot and channel) or ``sum``."""
    branch_ratio: float | None = None
    """Share of the output channels from the neighbour branch, the rest from the replaced kind of layer; null: none."""
    options: dict[str, Any] = field(default_factory=dict)
    """Free settings for operators from other modules."""


@dataclass
class SwapRule:
    """Which layers to replace. All given conditions must hold; ``depths`` and the like count what is left."""

    kind: str = "auto"
    """``conv``, ``attention``, or ``auto``: the kind that the operator replaces."""
    match: str | None = "*"
    """Glob over module names (``layer1.*``); null replaces nothing."""
    exclude: list[str] = field(default_factory=list)
    """Globs of module names to leave alone; the classifier head always is."""
    min_kernel: int = 1
    """Smallest kernel side of a convolution to replace."""
    stages: list[int] | None = None
    """Stages of the backbone in timm's ``feature_info`` order (resnet: 0 is the stem; vit: one stage per block)."""
    depths: list[int] | None = None
    """Indices among the layers that meet the conditions above, in forward order; negative ones count from the end."""
    first: int | None = None
    """Only the first n of them."""
    last: int | None = None
    """Only the last n of them."""
    every: int | None = None
    """Only every n-th of them, starting with the first."""
    fraction: list[float] | None = None
    """Only those in the span [from, to] of the depth, both within [0, 1]."""
    operator: dict[str, Any] = field(default_factory=dict)
    """Operator settings for these layers alone, such as ``{k: 4}``."""


@dataclass
class SwapConfig(SwapRule):
    """The swap policy: one rule given here, or several named ones in ``rules``."""

    init: str = "fresh"
    """``fresh`` weights, or ``transfer`` those of the replaced layer."""
    rules: dict[str, Any] = field(default_factory=dict)
    """Named rules, each with the keys above; when given they stand instead of it. No layer may be claimed twice."""

    def effective_rules(self) -> dict[str, SwapRule]:
        """Return the rules that count, by name."""
        if self.rules:
            return {n: rule if isinstance(rule, SwapRule) else SwapRule(**rule) for n, rule in self.rules.items()}
        if self.match is None:
            return {}
        return {"swap": SwapRule(**{f.name: getattr(self, f.name) for f in fields(SwapRule)})}


@dataclass
class TrackConfig:
    """One scheduled value. ``shape=constant`` leaves the operator's own value."""

    shape: str = "constant"
    """``constant``, ``linear``, ``cosine`` or ``step``."""
    over: str = "time"
    """``time`` (fraction of training), ``depth`` (first to last swapped layer) or ``both`` (their product)."""
    start: float = 0.0
    """Value before ``begin``."""
    end: float = 1.0
    """Value after ``finish``."""
    begin: float = 0.0
    """Fraction at which the change begins."""
    finish: float = 1.0
    """Fraction at which it ends."""
    steps: int = 4
    """Number of equal jumps of ``shape=step``."""


@dataclass
class ScheduleConfig:
    """How blend, k and temperature move over training and depth."""

    blend: TrackConfig = field(default_factory=TrackConfig)
    k: TrackConfig = field(default_factory=TrackConfig)
    temperature: TrackConfig = field(default_factory=TrackConfig)


@dataclass
class DataConfig:
    """The data set, and what is done to a batch on the training device."""

    name: str = "digits"
    target: str = "convnn.data.load_digits"
    """Function ``(config) -> convnn.data.Dataset``."""
    root: str = "data"
    """Folder of the files; below it the layout that torchvision uses, or train/CLASS and test/CLASS."""
    download: bool = True
    """Fetch what is missing (cifar10, cifar100)."""
    limit: int | None = None
    """Use this many training images, spread evenly over the classes, chosen by ``split_seed``."""
    limit_test: int | None = None
    """The same for test images."""
    val_fraction: float = 0.0
    """Share of the training images held out to choose the best checkpoint; 0 chooses it on the test set and says so."""
    split_seed: int = 0
    """Seed of the validation split and of ``limit``."""
    image_size: int | None = None
    """Side in pixels of what the network sees; null takes the backbone's, else the images' own."""
    load_size: int | None = None
    """Side in pixels at which an image folder is kept in memory; null keeps the first image's size."""
    crop_padding: int = 0
    """Random crops after padding by this many pixels (of the stored image); 0: none."""
    flip: bool = False
    """Random horizontal flips."""
    mean: list[float] = field(default_factory=lambda: [0.5])
    """Per channel, for pixels in [0, 1]; one value serves all channels."""
    std: list[float] = field(default_factory=lambda: [0.5])
    size: int = 2048
    """Number of images of the synthetic set."""
    num_classes: int = 10
    """Number of classes of the synthetic set."""
    options: dict[str, Any] = field(default_factory=dict)
    """Free settings for data sets from other modules."""


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule, both timm's."""

    name: str = "adamw"
    """Name in timm's optimizer registry."""
    lr: float = 1e-3
    """Peak learning rate for the given batch size; it is not scaled."""
    weight_decay: float = 0.05
    momentum: float = 0.9
    """For optimizers that have one."""
    decay_norm_and_bias: bool = False
    """Apply weight decay to biases and normalisation weights too."""
    sched: str = "cosine"
    """``constant`` or a name of timm's scheduler factory (cosine, step, poly, ...), updated every step."""
    warmup_epochs: int = 0
    warmup_lr: float = 1e-6
    min_lr: float = 0.0
    clip_grad: float | None = None
    """Largest norm of the whole gradient; null: no clipping."""


@dataclass
class TrainConfig:
    """The training loop."""

    epochs: int = 20
    max_steps: int | None = None
    """Stop after this many optimizer steps in all; null: no limit."""
    batch_size: int = 128
    eval_batch_size: int | None = None
    """Null: the training batch size."""
    label_smoothing: float = 0.0
    mixup: float = 0.0
    """Alpha of Mixup; 0: off."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0: off."""
    ema: float | None = None
    """Decay of the exponential moving average of the weights, which is then what gets evaluated; null: off."""
    amp: str = "auto"
    """``auto`` (bf16 on CUDA, float32 elsewhere), ``bf16`` or ``off``."""
    channels_last: bool = False
    """Memory format of images and convolution weights."""
    compile: bool = False
    """Train through ``torch.compile``."""
    deterministic: str = "false"
    """``false``, ``warn`` or ``true``: torch's deterministic algorithms."""


@dataclass
class TrackerConfig:
    """Where metrics go besides metrics.jsonl."""

    name: str = "wandb"
    """``wandb`` or ``jsonl`` (nothing besides)."""
    mode: str = "offline"
    """Of W&B: ``offline``, ``online`` (falls back to offline without a key or network) or ``disabled``."""
    project: str = "convnn"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    init_timeout: int = 20
    """Seconds that W&B may take to start online."""


@dataclass
class RunConfig:
    """The run folder."""

    dir: str | None = None
    """Its path; null: ``<root>/<name>-<fingerprint>``."""
    root: str = "runs"
    name: str | None = None
    """First part of the folder's name; null: made from backbone, operator, k, blend and seed."""
    if_exists: str = "fail"
    """``fail``, ``resume``, ``skip`` (when complete, else resume) or ``overwrite``."""


@dataclass
class Config:
    """A whole run."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    operator: OperatorConfig = field(default_factory=OperatorConfig)
    swap: SwapConfig = field(default_factory=SwapConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    seed: int = 0
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    debug: bool = False
    """Show the traceback of an error."""


# --------------------------------------------------------------------------------------------- nearest names


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, else the list of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}"


def all_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Return every dotted key of the schema, leaves and groups."""
    keys = []
    for f in fields(schema):
        keys.append(prefix + f.name)
        default = f.default_factory() if callable(f.default_factory) else None
        if is_dataclass(default):
            keys += all_keys(type(default), f"{prefix}{f.name}.")
    return keys


_FREE = ("backbone.kwargs", "operator.options", "data.options", "swap.operator", "swap.rules")


def unknown_key_error(key: str, schema: type = Config) -> ConfigError:
    """Return the error for a key that the schema lacks, with the nearest key that it has."""
    known = all_keys(schema)
    parent, _, leaf = key.rpartition(".")
    free = next((k for k in _FREE if key == k or key.startswith(f"{k}.")), None)
    if free:
        example = key if key != free else f"{free}.KEY"
        return ConfigError(f"'{key}' is not set yet; add an entry with a plus sign: +{example}=VALUE")
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent]
    close = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.5)
    if close:
        return ConfigError(f"unknown key '{key}'; did you mean '{f'{parent}.' if parent else ''}{close[0]}'?")
    return ConfigError(f"unknown key '{key}'{nearest(key, siblings if siblings and parent else known)}")


def check_keys(values: Mapping[str, Any], schema: type = Config, prefix: str = "") -> None:
    """Raise ConfigError for any key of ``values`` that the schema lacks (``+key=`` gets past Hydra's own check)."""
    by_name = {f.name: f for f in fields(schema)}
    for name, value in values.items():
        if name not in by_name:
            raise unknown_key_error(prefix + str(name))
        factory = by_name[name].default_factory
        default = factory() if callable(factory) else None
        if is_dataclass(default) and isinstance(value, Mapping):
            check_keys(value, type(default), f"{prefix}{name}.")
    if schema is SwapConfig:
        for name, rule in (values.get("rules") or {}).items():
            if not isinstance(rule, Mapping):
                raise ConfigError(f"{prefix}rules.{name}={rule} is not a rule; write {prefix}rules.{name}.match=GLOB")
            for key in rule:
                if key not in {f.name for f in fields(SwapRule)}:
                    hint = nearest(key, [f.name for f in fields(SwapRule)])
                    raise ConfigError(f"unknown key '{prefix}rules.{name}.{key}'{hint}")


# ---------------------------------------------------------------------------------------------------- checks


def _choice(key: str, value: str, choices: Iterable[str]) -> None:
    choices = list(choices)
    if value not in choices:
        raise ConfigError(f"{key}={value} is not one of {', '.join(choices)}{_did_you_mean(value, choices)}")


def _did_you_mean(value: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(str(value), choices, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _range(
    key: str,
    value: float | None,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    if value is None:
        return
    inside = math.isfinite(value)
    inside &= value > low if open_low else value >= low
    inside &= value < high if open_high else value <= high
    if not inside:
        span = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ConfigError(f"{key}={value} must lie in {span}")


def check_operator(operator: OperatorConfig, prefix: str = "operator") -> None:
    """Raise ConfigError when the operator's settings contradict each other or leave their range."""
    p = prefix
    _choice(f"{p}.kind", operator.kind, [CONV, ATTENTION])
    _choice(f"{p}.similarity", operator.similarity, ["cosine", "euclidean", "dot"])
    _choice(f"{p}.distance", operator.distance, ["chebyshev", "euclidean"])
    _choice(f"{p}.candidates", operator.candidates, ["all", "random", "grid"])
    _choice(f"{p}.eval_candidates", operator.eval_candidates, ["same", "all", "resample"])
    _choice(f"{p}.slots", operator.slots, ["rank", "raster", "window"] if operator.kind == CONV else ["rank", "raster"])
    _choice(f"{p}.weighting", operator.weighting, ["ones", "softmax"])
    _choice(f"{p}.k_policy", operator.k_policy, ["error", "clamp"])
    own = {"convnn.layers.ConvNN2d": ["conv"], "convnn.layers.ConvNNAttention": ["depthwise", "sum"]}
    own["convnn.hybrid.HybridConvNN2d"] = own["convnn.layers.ConvNN2d"]
    own["convnn.hybrid.HybridConvNNAttention"] = own["convnn.layers.ConvNNAttention"]
    _choice(f"{p}.aggregation", operator.aggregation, own.get(operator.target, ["conv", "depthwise", "sum"]))
    _range(f"{p}.k", operator.k, 1)
    _range(f"{p}.blend", operator.blend, 0, 1)
    _range(f"{p}.temperature", operator.temperature, 0, open_low=True)
    _range(f"{p}.branch_ratio", operator.branch_ratio, 0, 1)
    _range(f"{p}.num_candidates", operator.num_candidates, 1)
    if operator.k_policy == "error" and operator.candidates != "all":
        available = operator.num_candidates ** (2 if operator.candidates == "grid" else 1)
        if operator.k > available:
            raise ConfigError(
                f"{p}.k={operator.k} exceeds the {available} {operator.candidates} candidates; "
                f"raise {p}.num_candidates or lower {p}.k"
            )
    if operator.slots == "raster" and operator.k_policy == "clamp":
        raise ConfigError(f"{p}.k_policy=clamp needs {p}.slots=rank: a clamped raster slot has no fixed meaning")


def check_rule(rule: SwapRule, prefix: str) -> None:
    """Raise ConfigError when a swap rule is out of range."""
    _choice(f"{prefix}.kind", rule.kind, ["auto", CONV, ATTENTION])
    for name in ("min_kernel", "first", "last", "every"):
        _range(f"{prefix}.{name}", getattr(rule, name), 1)
    for stage in rule.stages or []:
        _range(f"{prefix}.stages", stage, 0)
    if rule.fraction is not None and (len(rule.fraction) != 2 or not 0 <= rule.fraction[0] < rule.fraction[1] <= 1):
        raise ConfigError(f"{prefix}.fraction={rule.fraction} must be [from, to] with 0 <= from < to <= 1")
    given = [n for n in ("depths", "first", "last", "every", "fraction") if getattr(rule, n) is not None]
    if len(given) > 1:
        raise ConfigError(f"{prefix}: give one of {' and '.join(given)}, not both")
    known = {f.name for f in fields(OperatorConfig)}
    for key in rule.operator:
        if key not in known:
            raise ConfigError(f"unknown key '{prefix}.operator.{key}'{nearest(key, known)}")


def check_schedule(schedule: ScheduleConfig, operator: OperatorConfig) -> None:
    """Raise ConfigError when a scheduled value can leave the operator's range."""
    bounds = {"blend": (0.0, 1.0), "k": (1.0, math.inf), "temperature": (0.0, math.inf)}
    for name, (low, high) in bounds.items():
        track: TrackConfig = getattr(schedule, name)
        p = f"schedule.{name}"
        _choice(f"{p}.shape", track.shape, ["constant", "linear", "cosine", "step"])
        _choice(f"{p}.over", track.over, ["time", "depth", "both"])
        if track.shape == "constant":
            continue
        for end in ("start", "end"):
            _range(f"{p}.{end}", getattr(track, end), low, high, open_low=name == "temperature")
        _range(f"{p}.begin", track.begin, 0, 1, open_high=True)
        _range(f"{p}.finish", track.finish, 0, 1)
        if track.finish <= track.begin:
            raise ConfigError(f"{p}.finish={track.finish} must be greater than {p}.begin={track.begin}")
        _range(f"{p}.steps", track.steps, 1)
        if name == "k":
            if max(track.start, track.end) > operator.k:
                raise ConfigError(
                    f"{p} goes up to {max(track.start, track.end):g}, but the layers are built with "
                    f"operator.k={operator.k}; set operator.k to the largest value of the schedule"
                )
            if operator.slots == "raster":
                raise ConfigError(f"{p} needs operator.slots=rank: with raster the slots of a smaller k shift")


def check(config: Config) -> Config:
    """Check everything that types cannot; return the configuration unchanged.

    Raises:
        ConfigError: one line that names the key and the fix.
    """
    check_operator(config.operator)
    for name, rule in config.swap.effective_rules().items():
        check_rule(rule, f"swap.rules.{name}" if config.swap.rules else "swap")
    for name, rule in config.swap.effective_rules().items():
        if rule.operator:
            merged = OperatorConfig(**(asdict(config.operator) | rule.operator))
            check_operator(merged, f"swap.rules.{name}.operator" if config.swap.rules else "swap.operator")
    _choice("swap.init", config.swap.init, ["fresh", "transfer"])
    check_schedule(config.schedule, config.operator)

    backbone, data, optim, train = config.backbone, config.data, config.optim, config.train
    _choice("backbone.stem", backbone.stem, ["default", "small"])
    _choice("backbone.pos_embed", backbone.pos_embed, ["learned", "sincos"])
    _range("backbone.drop_rate", backbone.drop_rate, 0, 1, open_high=True)
    _range("backbone.drop_path_rate", backbone.drop_path_rate, 0, 1, open_high=True)
    _range("backbone.image_size", backbone.image_size, 1)
    _range("backbone.patch_size", backbone.patch_size, 1)
    for name in ("limit", "limit_test", "image_size", "load_size", "size", "num_classes"):
        _range(f"data.{name}", getattr(data, name), 1)
    _range("data.val_fraction", data.val_fraction, 0, 1, open_high=True)
    _range("data.crop_padding", data.crop_padding, 0)
    _range("data.split_seed", data.split_seed, 0)
    for value in data.std:
        _range("data.std", value, 0, open_low=True)
    if len(data.mean) != len(data.std):
        raise ConfigError(f"data.mean has {len(data.mean)} values and data.std {len(data.std)}; give as many of each")
    size = data.image_size or backbone.image_size
    if size and backbone.patch_size and size % backbone.patch_size:
        raise ConfigError(
            f"backbone.patch_size={backbone.patch_size} does not divide the image side {size}; "
            "change it or data.image_size"
        )
    _range("optim.lr", optim.lr, 0, open_low=True)
    _range("optim.weight_decay", optim.weight_decay, 0)
    _range("optim.momentum", optim.momentum, 0, 1, open_high=True)
    _range("optim.warmup_epochs", optim.warmup_epochs, 0)
    _range("optim.min_lr", optim.min_lr, 0)
    _range("optim.warmup_lr", optim.warmup_lr, 0)
    _range("optim.clip_grad", optim.clip_grad, 0, open_low=True)
    _range("train.epochs", train.epochs, 1)
    _range("train.max_steps", train.max_steps, 1)
    _range("train.batch_size", train.batch_size, 1)
    _range("train.eval_batch_size", train.eval_batch_size, 1)
    _range("train.label_smoothing", train.label_smoothing, 0, 1, open_high=True)
    _range("train.mixup", train.mixup, 0)
    _range("train.cutmix", train.cutmix, 0)
    _range("train.ema", train.ema, 0, 1, open_low=True, open_high=True)
    _choice("train.amp", train.amp, ["auto", "bf16", "off"])
    _choice("train.deterministic", train.deterministic, ["false", "warn", "true"])
    if optim.sched != "constant" and optim.warmup_epochs >= train.epochs:
        raise ConfigError(f"optim.warmup_epochs={optim.warmup_epochs} must be less than train.epochs={train.epochs}")
    if (train.mixup or train.cutmix) and train.batch_size % 2:
        raise ConfigError(f"train.batch_size={train.batch_size} must be even with train.mixup or train.cutmix")
    _choice("tracker.name", config.tracker.name, ["wandb", "jsonl"])
    _choice("tracker.mode", config.tracker.mode, ["offline", "online", "disabled"])
    _range("tracker.init_timeout", config.tracker.init_timeout, 1)
    _choice("run.if_exists", config.run.if_exists, ["fail", "resume", "skip", "overwrite"])
    _range("seed", config.seed, 0, 2**32 - 1)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device):
        raise ConfigError(f"device={config.device} is not one of auto, cpu, cuda, cuda:N")
    return config


# ----------------------------------------------------------------------------------------- identity of a run

_NOT_IDENTITY = ("run", "tracker", "device", "debug")


def identity(config: Config) -> dict[str, Any]:
    """Return what decides the outcome of a run: all but where it is kept, tracked and computed."""
    values = asdict(config)
    for key in _NOT_IDENTITY:
        values.pop(key)
    for key in ("root", "download"):
        values["data"].pop(key)
    if config.data.name == "imagefolder":
        values["data"]["root"] = config.data.root
    return values


def fingerprint(config: Config) -> str:
    """Return a hash of ``identity(config)``, 16 hexadecimal digits."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return ``key: old -> new`` for each leaf in which two nested mappings differ."""
    rows = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key, "(missing)"), new.get(key, "(missing)")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            rows += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            rows.append(f"{prefix}{key}: {a} -> {b}")
    return rows


def run_name(config: Config) -> str:
    """Return the readable part of the run folder's name, such as ``resnet18-convnn-k9-b1-s0``."""
    if config.run.name:
        return config.run.name
    parts = [config.backbone.name]
    if config.swap.effective_rules():
        o = config.operator
        parts += [o.name, f"k{o.k}", f"b{o.blend:g}"]
        if o.branch_ratio is not None:
            parts.append(f"r{o.branch_ratio:g}")
    parts.append(f"s{config.seed}")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts))[:80]
