"""Checks that no type can express, and errors that name the key and the way out. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import fields, is_dataclass, replace
from typing import Any

from convnn.config.identity import LENGTH
from convnn.config.keys import own_operator
from convnn.config.schema import (
    ATTENTION,
    COMPILE_MODES,
    CONV,
    KERNEL,
    NO_TRACKER,
    TRACKERS,
    BackboneConfig,
    Config,
    DataConfig,
    OperatorConfig,
    ScheduleConfig,
    SwapRule,
    TrackConfig,
    TrackerConfig,
)
from convnn.errors import ConfigError
from convnn.ops.settings import GRAPHS, check_choice, check_fields, check_range
from convnn.ops.triton.limits import backend_limit

_RAND_AUGMENT = re.compile(r"rand(-(m|n|mmax|inc)\d+|-(p|mstd)\d+(\.\d+)?|-t(weights|3aw|3a))*")


def check_operator(operator: OperatorConfig, prefix: str = "operator") -> None:
    """Raise ConfigError when the operator's settings contradict each other or leave their range."""
    check_fields(operator, prefix)
    if operator.k == KERNEL and operator.kind == ATTENTION:
        raise ConfigError(f"{prefix}.k=kernel is for convolutions, whose window it counts; give {prefix}.k a number")
    # What depends on the number is checked for each layer.
    reason = contradiction(replace(operator, k=1) if operator.k == KERNEL else operator)
    if reason:
        raise ConfigError(reason.replace("{p}", prefix))


def contradiction(o: OperatorConfig) -> str | None:
    """Return why operator settings cannot go together, ``{p}`` standing for the prefix of the keys, or None."""
    foreign: dict[str, Any] = {"border": "nearest", "layout": "grid", "head_dim": None, "dropout_on": "weights"}
    foreign |= {"branch_input": "all", "causal": False, "token_dilation": 1, "bias_selects": False}
    if o.kind == ATTENTION:
        foreign = {"projection": "identity", "coordinates": False, "shuffle": 1, "inner_bias": False}
    for key, neutral in foreign.items():
        if getattr(o, key) != neutral:
            default = "null" if neutral is None else neutral
            return f"{{p}}.{key}={getattr(o, key)} does not apply to operators of kind {o.kind}; leave it at {default}"
    k = int(o.k)
    if o.kind == ATTENTION and o.aggregation in GRAPHS:
        return f"{{p}}.aggregation={o.aggregation} is for operators of kind conv; use conv, depthwise, separable or sum"
    if o.kind == ATTENTION and o.slots == "window" and o.border != "zeros":
        return "{p}.slots=window needs a window: set {p}.border=zeros, or {p}.slots=rank"
    if o.aggregation in GRAPHS and o.weighting != "ones":
        return f"{{p}}.aggregation={o.aggregation} needs {{p}}.weighting=ones, not {o.weighting}"
    if o.rank_step > 1 and o.slots != "rank":
        return "{p}.rank_step needs {p}.slots=rank: a neighbour's slot is its rank"
    if o.causal and o.branch_ratio is not None:
        return "{p}.causal=true leaves a hybrid's attention branch to see all tokens; use operator=convnn_attention"
    if o.causal and o.border == "shift":
        return "{p}.causal=true has windows that end at the query; set {p}.candidates=window, not {p}.border=shift"
    if o.coordinates and o.aggregation not in ("conv", "separable"):
        return f"{{p}}.coordinates=true needs {{p}}.aggregation=conv or separable, not {o.aggregation}"
    if o.inner_bias and o.aggregation != "separable":
        return f"{{p}}.inner_bias=true needs {{p}}.aggregation=separable, not {o.aggregation}"
    for key in ("self_again", "self_score"):
        if getattr(o, key) is not None and not (o.self_first and o.slots == "rank"):
            return f"{{p}}.{key} needs {{p}}.self_first=true and {{p}}.slots=rank"
    if o.self_again is not None and o.similarity == "euclidean":
        return "{p}.self_again needs {p}.similarity=cosine or dot, not euclidean"
    if o.self_score is not None and o.weighting == "ones":
        return "{p}.self_score needs {p}.weighting=softmax or score: ones weigh all neighbours alike"
    if o.border != "nearest" and (math.isqrt(k) ** 2 != k or k % 2 == 0):
        return f"{{p}}.border={o.border} needs {{p}}.k to be an odd square (1, 9, 25, 49, ...), not {o.k}"
    if o.border != "nearest" and o.layout == "sequence":
        return f"{{p}}.border={o.border} needs {{p}}.layout=grid: its window is square"
    if o.border == "shift" and o.distance != "chebyshev":
        return "{p}.border=shift needs {p}.distance=chebyshev: its window is square"
    if o.border == "shift" and o.candidates == "window" and o.num_candidates < math.isqrt(k) // 2:
        return "{p}.border=shift with {p}.candidates=window needs {p}.num_candidates >= half the window's side"
    if o.learn_blend == "head" and o.kind == CONV:
        return "{p}.learn_blend=head needs heads; use layer for operators of kind conv"
    # Attention has prefix tokens besides, whose number the model knows.
    if o.kind == CONV and o.k_policy == "error" and o.candidates not in ("all", "stride"):
        power = 1 if o.candidates == "random" else 2
        side = 2 * o.num_candidates + 1 if o.candidates == "window" else o.num_candidates
        if k > side**power:
            return (
                f"{{p}}.k={o.k} exceeds the {side**power} {o.candidates} candidates; "
                "raise {p}.num_candidates, lower {p}.k or set {p}.k_policy=clamp"
            )
    if o.slots == "raster" and o.k_policy == "clamp":
        return "{p}.k_policy=clamp needs {p}.slots=rank: a clamped raster slot has no fixed meaning"
    limit = None
    if o.backend == "triton":
        learned = o.learn_blend != "no"
        limit = backend_limit(o, o, by_features=o.blend > 0 or learned, learned=learned)
    return None if limit is None else f"{{p}}.backend=triton: {limit}; or set {{p}}.backend=auto"


def check_rule(rule: SwapRule, prefix: str) -> None:
    """Raise ConfigError when a swap rule is out of range."""
    check_fields(rule, prefix)
    for stage in rule.stages or []:
        check_range(f"{prefix}.stages", stage, 0)
    if rule.fraction is not None and (len(rule.fraction) != 2 or not 0 <= rule.fraction[0] < rule.fraction[1] <= 1):
        raise ConfigError(f"{prefix}.fraction={rule.fraction} must be [from, to] with 0 <= from < to <= 1")
    given = [n for n in ("depths", "first", "last", "every", "fraction") if getattr(rule, n) is not None]
    if len(given) > 1:
        raise ConfigError(f"{prefix}: give one of {' and '.join(given)}, not both")


def check_kind(rule: SwapRule, operator: OperatorConfig, prefix: str) -> None:
    """Raise ConfigError when a rule asks for layers of the kind that the operator does not replace."""
    if rule.kind not in ("auto", operator.kind):
        way = {CONV: "swap=all_conv", ATTENTION: "swap=all_attention"}[operator.kind]
        raise ConfigError(
            f"operator={operator.name} replaces {operator.kind} layers, but {prefix}.kind={rule.kind}; "
            f"set {way} or choose another operator"
        )


def check_kinds(config: Config) -> None:
    """Raise ConfigError where an operator does not replace what its rule asks for."""
    for name, rule in config.swap.effective_rules().items():
        prefix = f"swap.rules.{name}" if config.swap.rules else "swap"
        check_kind(rule, own_operator(rule, config.operator, prefix), prefix)


def check_schedule(schedule: ScheduleConfig, operator: OperatorConfig, prefix: str = "operator") -> None:
    """Raise ConfigError when a scheduled value can leave the operator's range."""
    bounds = {"blend": (0.0, 1.0), "k": (1.0, math.inf), "temperature": (0.0, math.inf)}
    for name, (low, high) in bounds.items():
        track: TrackConfig = getattr(schedule, name)
        p = f"schedule.{name}"
        check_fields(track, p)
        if track.shape == "constant":
            continue
        for end in ("start", "end"):
            check_range(f"{p}.{end}", getattr(track, end), low, high, above=name == "temperature")
        check_range(f"{p}.begin", track.begin, 0, 1, below=True)
        check_range(f"{p}.finish", track.finish, 0, 1)
        if track.finish <= track.begin:
            raise ConfigError(f"{p}.finish={track.finish} must be greater than {p}.begin={track.begin}")
        check_range(f"{p}.steps", track.steps, 1)
        if name == "blend" and operator.learn_blend != "no":
            raise ConfigError(f"{p} and {prefix}.learn_blend={operator.learn_blend} both move the blend; choose one")
        if name == "k":
            if operator.k == KERNEL:
                raise ConfigError(f"{p} needs {prefix}.k to be a number: with kernel each layer has its own")
            if max(track.start, track.end) > int(operator.k):
                raise ConfigError(
                    f"{p} goes up to {max(track.start, track.end):g}, but the layers are built with "
                    f"{prefix}.k={operator.k}; set {prefix}.k to the largest value of the schedule"
                )
            if operator.border != "nearest":
                raise ConfigError(f"{p} needs {prefix}.border=nearest: the window's side belongs to a fixed k")
            if operator.slots == "raster":
                raise ConfigError(f"{p} needs {prefix}.slots=rank: with raster the slots of a smaller k shift")


def check_stream(data: DataConfig) -> None:
    """Raise ConfigError when the settings of streamed image files are out of range or contradict each other."""
    for name, value, high in (("scale", data.scale, 1), ("ratio", data.ratio, math.inf)):
        if value is not None and not (len(value) == 2 and 0 < value[0] <= value[1] <= high):
            limit = " <= 1" if high == 1 else ""
            raise ConfigError(f"data.{name}={value} must be [from, to] with 0 < from <= to{limit}")
    if data.rand_augment is not None and not _RAND_AUGMENT.fullmatch(data.rand_augment):
        raise ConfigError(
            f"data.rand_augment={data.rand_augment} is no RandAugment of timm, such as rand-m9-mstd0.5-inc1"
        )
    needs = data.file_transforms()
    memory_only = data.target.startswith("convnn.data.") and data.target != "convnn.data.load_imagefolder"
    of_folders = needs + ["stream"] * (data.stream == "true") + ["val_folder"] * (not data.val_folder)
    if memory_only and of_folders:
        key = of_folders[0]
        raise ConfigError(f"data.{key} is for image folders, not data={data.name}; leave it at its default")
    if needs and data.stream == "false":
        raise ConfigError(f"data.{needs[0]} needs files that are streamed; set data.stream=auto")
    if data.scale and data.crop_padding:
        raise ConfigError("data.scale and data.crop_padding are both random crops; set data.crop_padding=0")


def check_tracker(tracker: TrackerConfig) -> None:
    """Raise ConfigError for unknown trackers, and names that W&B would refuse once the run has begun."""
    for name in tracker.names:
        check_choice("tracker.name", name, (*TRACKERS, NO_TRACKER))
    if "wandb" not in tracker.running:
        return
    bad = [char for char in "/\\#?%:" if char in tracker.project]
    if bad:
        raise ConfigError(
            f"tracker.project={tracker.project} has {' '.join(bad)}, which W&B refuses; choose another name"
        )
    sizes = [("project", tracker.project, 128), ("group", tracker.group, 128), *(("tags", t, 64) for t in tracker.tags)]
    for key, text, most in sizes:
        if text is not None and not 1 <= len(text) <= most:
            shown = text if len(text) < 40 else f"{text[:30]}..."
            raise ConfigError(f"tracker.{key}: W&B takes 1 to {most} characters, and '{shown}' has {len(text)}")


def _check_backbone(backbone: BackboneConfig) -> None:
    """Raise ConfigError where the network's weights or tokens are told twice, or not as they can be."""
    ways = {
        "pretrained=true": backbone.pretrained,
        "checkpoint": backbone.checkpoint,
        "kwargs.checkpoint_path": "checkpoint_path" in backbone.kwargs,
    }
    given = [f"backbone.{key}" for key, value in ways.items() if value]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} both say where the weights come from; give one")
    freeze, grid = backbone.freeze, backbone.token_grid
    if not isinstance(freeze, list) or not all(isinstance(glob, str) for glob in freeze):
        raise ConfigError(f"backbone.freeze={freeze} must be a glob of module names or a list of such")
    if grid is not None and (len(grid) != 2 or min(grid) < 1):
        raise ConfigError(f"backbone.token_grid={grid} must be [rows, columns]")
    if grid is None and backbone.prefix_tokens is not None:
        raise ConfigError("backbone.prefix_tokens needs backbone.token_grid=[ROWS,COLUMNS] beside it")


def check(config: Config) -> Config:
    """Check everything that types cannot; return the configuration unchanged.

    Raises:
        ConfigError: one line that names the key and the fix.
    """
    check_operator(config.operator)
    check_schedule(config.schedule, config.operator)
    for name, rule in config.swap.effective_rules().items():
        prefix = f"swap.rules.{name}" if config.swap.rules else "swap"
        check_rule(rule, prefix)
        if rule.operator:
            own = own_operator(rule, config.operator, prefix)
            check_operator(own, f"{prefix}.operator")
            check_schedule(config.schedule, own, f"{prefix}.operator")
    backbone, data, optim, train = config.backbone, config.data, config.optim, config.train
    sections = {f.name: getattr(config, f.name) for f in fields(config) if is_dataclass(getattr(config, f.name))}
    for name, section in sections.items():
        check_fields(section, name)
    check_fields(config, "")
    check_stream(data)
    check_tracker(config.tracker)
    for value in data.std:
        check_range("data.std", value, 0, above=True)
    if len(data.mean) != len(data.std):
        raise ConfigError(f"data.mean has {len(data.mean)} values and data.std {len(data.std)}; give as many of each")
    _check_backbone(backbone)
    size = data.image_size or backbone.image_size
    if size and backbone.patch_size and size % backbone.patch_size:
        raise ConfigError(
            f"backbone.patch_size={backbone.patch_size} does not divide the image side {size}; "
            "change it or data.image_size"
        )
    if not isinstance(train.compile, bool) and train.compile not in COMPILE_MODES:
        modes = ", ".join(COMPILE_MODES)
        raise ConfigError(f"train.compile={train.compile} is not one of false, true, {modes}")
    if optim.sched != "constant" and optim.warmup_epochs >= train.epochs:
        raise ConfigError(f"optim.warmup_epochs={optim.warmup_epochs} must be less than train.epochs={train.epochs}")
    for earlier in train.extended_from:
        if not {"epochs"} <= earlier.keys() <= set(LENGTH) or min(earlier.values()) < 1:
            raise ConfigError(
                f"train.extended_from={train.extended_from} must be earlier lengths, such as [{{epochs: 10}}]"
            )
    if train.grad_accumulation > train.batch_size:
        raise ConfigError(
            f"train.grad_accumulation={train.grad_accumulation} cuts train.batch_size={train.batch_size}, the images "
            "of a whole step, into parts of less than one; lower it"
        )
    if train.grad_accumulation > 1 and train.compile in COMPILE_MODES:
        raise ConfigError(
            f"train.grad_accumulation={train.grad_accumulation} adds up gradients, which the CUDA graphs of "
            f"train.compile={train.compile} overwrite; set train.compile=true"
        )
    if (train.mixup or train.cutmix) and train.batch_size % 2:
        raise ConfigError(f"train.batch_size={train.batch_size} must be even with train.mixup or train.cutmix")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", config.device):
        raise ConfigError(f"device={config.device} is not one of auto, cpu, cuda, cuda:N, mps")
    return config
