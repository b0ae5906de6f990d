"""Typed configuration: one dataclass per group of ``conf/``. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from convnn.config.data_schema import DataConfig as DataConfig  # where its users look for it
from convnn.ops.settings import Mixing, Selection, choice, later, number

CONV, ATTENTION = "conv", "attention"
KERNEL = "kernel"
"""A number of neighbours: that of the taps in the window of the replaced layer."""
COMPILE_MODES = ("reduce-overhead", "max-autotune")
TRACKERS, NO_TRACKER = ("wandb", "tensorboard", "trackio"), "jsonl"
SMALL_IMAGE = 64
"""Images below this many pixels a side get the small stem, with ``stem=auto``."""


@dataclass
class BackboneConfig:
    """The network, from timm's registry, before any layer is swapped."""

    name: str = "resnet18"
    """Name in timm's registry, see ``timm.list_models()``."""
    module: str | None = None
    """Python module to import first, for models registered outside timm with ``timm.models.register_model``."""
    pretrained: bool = False
    """Load timm's pretrained weights (needs a network or a filled cache)."""
    checkpoint: str | None = later(None)
    """File of weights to begin from instead: .safetensors, .pt, .pth or .bin, with the key names of timm, torchvision
    (ResNet, ViT) or Hugging Face (ResNet, ViT, DeiT, DINOv2); a classifier of other classes begins anew. Or a run
    folder: its last weights, those of replaced layers too; the best are ``DIR/checkpoints/best.pt``."""
    checkpoint_sha256: str | None = later(None)
    """SHA-256 of that file, by which the run is known wherever the file lies; null: taken from the file."""
    freeze: Any = later(field(default_factory=list))  # noqa: RUF009
    """Glob, or list of globs, of modules or parameters that are not trained, after the swap (``patch_embed``,
    ``layer[12].*``); batch normalisation in such modules keeps its statistics and normalises by them."""
    stem: str = choice("default", "small", "auto")
    """``default``; ``small``: 3x3 stride-1 first convolution without max-pooling; or ``auto``: ``small`` for images
    below 64 pixels."""
    image_size: int | None = number(None, 1)
    """Side in pixels that images are resized to; null keeps the size of the data set."""
    patch_size: int | None = number(None, 1)
    """Side of a ViT patch in pixels; null keeps timm's."""
    pos_embed: str = choice("learned", "sincos", "sincos1d")
    """``learned``, or fixed sine-cosine positions (ViT only): ``sincos`` of row and column, 0 for CLS, or ``sincos1d``
    of the place in the sequence, CLS first (the paper's)."""
    init: str = later(choice("timm", "torch"))
    """Initial weights: ``timm``'s, or ``torch``'s own of linear layers and convolutions, and a standard normal CLS
    token (the paper's)."""
    norm_eps: float | None = later(number(None, 0, above=True))
    """Added to the variance by LayerNorm; null: timm's (1e-6). The paper's ViT has 1e-5."""
    drop_rate: float = number(0.0, 0, 1, below=True)
    """Dropout before the classifier, and in the blocks of a ViT."""
    drop_path_rate: float | None = number(None, 0, 1, below=True)
    """Stochastic depth; null leaves timm's default and supports models without it."""
    token_grid: list[int] | None = later(None)  # noqa: RUF009
    """Rows and columns of the tokens, for attention in networks that have no patch embedding to tell them; null: asked
    of the patch embedding at each call."""
    prefix_tokens: int | None = later(number(None, 0))
    """With ``token_grid``: tokens before the grid (CLS, registers); null: what the network says, else 0."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to ``timm.create_model`` as they are."""


@dataclass(frozen=True)
class _Named:
    """What an operator is called, and what builds it. A base class only so that these keys come first."""

    name: str = "convnn"
    """Label in run names and reports."""
    kind: str = choice(CONV, ATTENTION)
    """Kind of layer that it replaces: ``conv`` or ``attention``."""
    target: str = "convnn.ConvNN2d"
    """Class with a ``from_layer(layer, config, init, site)`` constructor."""


@dataclass(frozen=True)
class OperatorConfig(Mixing, Selection, _Named):
    """The neighbour-aggregation operator that takes the place of a layer (see docs/operators.md).

    How neighbours are chosen and mixed are the fields of ``convnn.ops.settings``; here stands what belongs to layers.
    """

    k: int | str = number(9, 1, words=(KERNEL,))  # type: ignore[assignment]
    """Neighbours per query; ``kernel``: as many as the window of the replaced layer has taps, convolutions only."""
    blend: float = number(1.0, 0, 1)
    """0 selects neighbours by position (convolution), 1 by features (attention), between by both."""
    learn_blend: str = choice("no", "layer", "head")
    """``no``, or a learnable blend per ``layer`` or per ``head``, starting at ``blend``; see ``straight_through``."""
    border: str = choice("nearest", "zeros", "shift")
    """Attention only, where a window would leave the grid: ``nearest`` tokens inside, ``zeros`` (a ring of zero tokens)
    or ``shift`` (the window moves inside, as in NATTEN). The last two need k to be an odd square."""
    layout: str = choice("grid", "sequence")
    """Attention only: tokens lie on the ``grid`` of patches, prefix tokens (CLS) apart, or all on one line in their
    order (``sequence``): positions, windows and candidate grids then have one dimension."""
    token_dilation: int = later(number(1, 1))
    """Attention only: distances count steps of this many tokens, and tokens between them are farther than all others
    (NATTEN's dilation); convolutions keep the dilation of the replaced layer."""
    head_dim: int | None = number(None, 1)
    """Attention only: channels per head of queries, keys and values; null: as the replaced layer."""
    dropout_on: str = later(choice("weights", "output"))
    """Attention only: the replaced layer's attention dropout acts on the neighbours' ``weights``, or on the ``output``
    of the aggregation, before the projection (the paper's layer)."""
    projection: str = choice("identity", "linear")
    """Convolutions only: compare and mix the features themselves (``identity``), or their 1x1 projections to queries,
    keys and values (``linear``, the paper's learned variant). Attention always projects."""
    coordinates: bool = False
    """Convolutions only: two more input channels of the aggregation hold each token's column and row in [-1, 1]."""
    shuffle: int = number(1, 1)
    """Convolutions only: pixel unshuffle by this factor before the layer and shuffle after it (channels x factor^2)."""
    bias: bool | None = None
    """Bias of the output (the attention's projection); null: as the replaced layer."""
    inner_bias: bool = later(False)
    """Convolutions with aggregation=separable: biases inside the layer too, of the slot weights, and of the 1x1 where a
    projection follows it (the paper's learned variant, whose output has none)."""
    branch_ratio: float | None = number(None, 0, 1)
    """Share of the output channels from the neighbour branch, the rest from the replaced kind of layer; null: none."""
    branch_kernel: int | None = number(None, 1)
    """Kernel side of the convolution branch of a hybrid; null keeps the replaced layer's."""
    branch_bias: bool | None = None
    """Bias of the convolution branch of a hybrid; null: as ``bias``."""
    branch_input: str = later(choice("all", "split"))
    """Attention hybrids: each branch reads ``all`` channels, or (``split``) as many as it gives (the paper's)."""
    branch_fuse: bool = True
    """End a convolutional hybrid with its 1x1 convolution; false only concatenates the branches."""
    options: dict[str, Any] = field(default_factory=dict)
    """Free settings for operators from other modules."""


@dataclass
class SwapRule:
    """Which layers to replace. All given conditions must hold; ``depths`` and the like count what is left."""

    kind: str = choice("auto", CONV, ATTENTION)
    """``conv``, ``attention``, or ``auto``: the kind that the operator replaces."""
    match: str | None = "*"
    """Glob over module names (``layer1.*``); null replaces nothing."""
    exclude: list[str] = field(default_factory=list)
    """Globs of module names to leave alone; the classifier head always is."""
    min_kernel: int = number(1, 1)
    """Smallest kernel side of a convolution to replace."""
    stages: list[int] | None = None
    """Stages of the backbone in timm's ``feature_info`` order (resnet: 0 is the stem; vit: one stage per block)."""
    depths: list[int] | None = None
    """Indices among the layers that meet the conditions above, in forward order; negative ones count from the end."""
    first: int | None = number(None, 1)
    """Only the first n of them."""
    last: int | None = number(None, 1)
    """Only the last n of them."""
    every: int | None = number(None, 1)
    """Only every n-th of them, starting with the first."""
    fraction: list[float] | None = None
    """Only those in the span [from, to] of the depth, both within [0, 1]."""
    operator: dict[str, Any] = field(default_factory=dict)
    """Operator settings for these layers alone, such as ``{k: 4}``."""


@dataclass
class SwapConfig(SwapRule):
    """The swap policy: one rule given here, or several named ones in ``rules``."""

    init: str = choice("auto", "fresh", "transfer")
    """``fresh`` weights; ``transfer`` those of the replaced layer; or ``auto``: in a backbone that loads its weights
    ``transfer`` where an operator of convnn defines it, else ``fresh``."""
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

    shape: str = choice("constant", "linear", "cosine", "step")
    """``constant``, ``linear``, ``cosine`` or ``step``."""
    over: str = choice("time", "depth", "both")
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
class OptimConfig:
    """Optimizer and learning-rate schedule, both timm's."""

    name: str = "adamw"
    """Name in timm's optimizer registry."""
    lr: float = number(1e-3, 0, above=True)
    """Peak learning rate for the given batch size; it is not scaled."""
    weight_decay: float = number(0.05, 0)
    """Of the weights; of all else with ``decay_norm_and_bias``."""
    momentum: float = number(0.9, 0, 1, below=True)
    """For optimizers that have one."""
    decay_norm_and_bias: bool = False
    """Apply weight decay to all that is trained: biases, normalisation weights and the class token too."""
    layer_decay: float | None = later(number(None, 0, 1, above=True))
    """Factor of the learning rate from each layer to the one before it, as timm groups the layers; null: one rate."""
    sched: str = "cosine"
    """``constant``, ``cosine``, ``tanh``, ``poly``, ``step`` or ``multistep``; updated every step."""
    warmup_epochs: int = number(0, 0)
    """Of a linear rise from ``warmup_lr``, part of the schedule's length; in a run that ``train.max_steps`` ends before
    it is over, it keeps its share of ``train.epochs``."""
    warmup_lr: float = number(1e-6, 0)
    """Learning rate of the first step of the warm-up."""
    min_lr: float = number(0.0, 0)
    """Where cosine, tanh and poly end."""
    decay_epochs: int | None = later(number(None, 1))
    """Of ``step``: epochs between two decays."""
    milestones: list[int] = later(field(default_factory=list))  # noqa: RUF009
    """Of ``multistep``: epochs after which it decays, such as [10, 15]."""
    decay_rate: float = later(number(0.1, 0, 1))
    """Of ``step`` and ``multistep``: factor of each decay."""
    power: float | None = later(number(None, 0, above=True))
    """Of ``poly``: the rate is ``(1 - time) ** power`` of its peak; 1 is a straight line."""
    clip_grad: float | None = number(None, 0, above=True)
    """Largest norm of the whole gradient; null: no clipping."""


@dataclass
class TrainConfig:
    """The training loop."""

    epochs: int = number(20, 1)
    """Passes over the training images."""
    max_steps: int | None = number(None, 1)
    """Stop after this many optimizer steps in all; null: no limit. All schedules end there."""
    extended_from: list[dict[str, int]] = later(field(default_factory=list))  # noqa: RUF009
    """Lengths that the run was planned for before it was extended, such as [{epochs: 10}]; ``train.py resume=DIR
    train.epochs=20`` writes it. From the end of each on the learning rate is that of a run of the next length."""
    batch_size: int = number(128, 1)
    """Images per step, over all processes together."""
    grad_accumulation: int = later(number(1, 1))
    """Parts that a step's images go through the network in, one after another, to take less memory: the step, its rate
    and its batch stay the same, but batch normalisation sees a part at a time."""
    eval_batch_size: int | None = number(None, 1)
    """Null: the training batch size."""
    label_smoothing: float = number(0.0, 0, 1, below=True)
    """Share of the target that is spread evenly over all classes; 0: off."""
    mixup: float = number(0.0, 0)
    """Alpha of Mixup; 0: off."""
    cutmix: float = number(0.0, 0)
    """Alpha of CutMix; 0: off."""
    ema: float | None = number(None, 0, 1, above=True, below=True)
    """Decay of the exponential moving average of the weights, which is then what gets evaluated; null: off."""
    amp: str = choice("auto", "bf16", "off")
    """``auto`` (bf16 on CUDA, float32 elsewhere), ``bf16`` or ``off``."""
    log_every: int | None = number(None, 1)
    """Steps between two lines of progress where no terminal shows a bar; null: about every 30 seconds."""
    channels_last: bool = False
    """Memory format of images and convolution weights. On a CPU without AVX-512, torch 2.15 crashes with it in
    1x1 convolutions that have a stride and fewer than 8 channels."""
    compile: bool | str = False
    """Train through ``torch.compile``: ``true``, or a mode of it that puts a GPU step's kernels into CUDA graphs:
    ``reduce-overhead``, or ``max-autotune``, which besides times several kernels for each product, for minutes before
    the first step. Each size of batch then has a graph of its own. On CUDA ``operator.backend=auto`` measures before
    each graph what will be fastest in it, plain torch compiled for tens of seconds a case among it."""
    sync_batchnorm: str = choice("auto", "true", "false")
    """With several processes (docs/several_gpus.md): ``true``: batch normalisation over the joint batch, needs GPUs;
    ``false``: over each process' part, with the first one's running statistics; ``auto``: true on GPUs."""
    deterministic: str = choice("false", "warn", "true")
    """``false``, ``warn`` or ``true``: torch's deterministic algorithms."""
    skip_nonfinite: int = number(0, 0)
    """Steps with an infinite or NaN loss or gradient to skip in all, such as spikes in bf16, before the run counts as
    diverged. Above 0, every step waits for the device."""


@dataclass
class TrackerConfig:
    """Where metrics go besides metrics.jsonl."""

    name: Any = "jsonl"
    """``wandb``, which the command line begins with, ``tensorboard``, ``trackio``, or a list of them, which
    ``tracker=[wandb,tensorboard]`` makes; ``jsonl``, or an empty list: nothing besides."""
    mode: str = choice("offline", "online", "disabled")
    """Of W&B: ``offline``, ``online`` (falls back to offline without a key or network) or ``disabled``."""
    project: str = "convnn"
    """Of W&B and trackio: the project that the run belongs to."""
    entity: str | None = None
    """Of W&B: user or team; null: the user's own default."""
    group: str | None = None
    """Of W&B and trackio: runs to show as one; a sweep sets its name here."""
    tags: list[str] = field(default_factory=list)
    """Of W&B and trackio: words to find the run by."""
    init_timeout: int = number(20, 1)
    """Seconds that W&B may take to start online."""

    @property
    def names(self) -> list[str]:
        """The tools besides metrics.jsonl, in the order given.

        ``name`` has them as one text, a list, or a mapping of each to true, into which the options of the group merge.
        """
        given = list(self.name) if isinstance(self.name, list | dict) else [] if self.name is None else [self.name]
        if isinstance(self.name, dict):
            given = [name for name in given if self.name[name]]
        return [name for name in dict.fromkeys(map(str, given)) if name != NO_TRACKER]

    @property
    def running(self) -> list[str]:
        """The tools that see the run: ``names`` less a disabled W&B."""
        return [name for name in self.names if name != "wandb" or self.mode != "disabled"]


@dataclass
class DiagnosticsConfig:
    """What each layer chooses on a few fixed test images, after an epoch. Changes no training, so no run's identity."""

    enabled: bool = True
    """Measure; false: only what training itself needs is computed."""
    images: int = number(8, 1)
    """Number of images, evenly spread over the test set."""
    every: int = number(1, 1)
    """Epochs between measurements."""
    pictures: bool = True
    """Draw the pictures of scripts/visualize.py at the end of a run that has a tracker, and log them there."""


@dataclass
class CheckpointConfig:
    """What stays of a run's models when it is complete; no part of its identity.

    While it trains there are the newest one and the one before it, to go on from, and the weights of the best epoch.
    """

    keep: str = choice("all", "last", "best")
    """The weights of the ``last`` epoch, of the ``best`` one, or of both (``all``)."""
    optimizer: bool = True
    """Keep the optimizer's state with the last weights, so that the run can be given more epochs."""
    predictions: str = choice("probabilities", "classes", "off")
    """What ``predictions.npz`` has of each test image, of the last epoch and of the best: the class that the model
    predicts, and with ``probabilities`` those of all classes in float16."""


@dataclass
class RunConfig:
    """The run folder."""

    dir: str | None = None
    """Its path; null: ``<root>/<name>-<fingerprint>``."""
    root: str = "runs"
    """Folder in which ``dir=null`` makes run folders."""
    name: str | None = None
    """First part of the folder's name; null: made from backbone, operator, k, blend and seed."""
    if_exists: str = choice("fail", "resume", "skip", "overwrite")
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
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    seed: int = number(0, 0, 2**32 - 1)
    """Of initial weights, the order of images, augmentation, dropout and drawn candidates."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; under torchrun each process takes the GPU of its number."""
    debug: bool = False
    """Show the traceback of an error."""
