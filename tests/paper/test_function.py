"""Rows that are called equal compute the published function: logits of the whole networks with equal weights."""

import re

import pytest
import torch
from published_networks import fixed_subset, vgg11, vit

from convnn.config.composer import Composer
from convnn.data.splits import Dataset, Split
from convnn.models.build import build_model
from convnn.ops import candidates
from convnn.paper.published import load_table, table_names

compose = Composer()
CIFAR = tuple(name for name in table_names() if not name.endswith("imagenet"))
STEP = "operator.score_step=1e-9"
"""Scores that are equal on paper differ by rounding errors, in each computation by others."""
SMALLER = {"vgg": ["+backbone.kwargs.mlp_ratio=0.01"], "vit": ["+backbone.kwargs.depth=2"]}
"""Less of what repeats: the head's width, the number of blocks."""
NUMBERS = ("branch_ratio", "branch_kernel", "num_candidates", "k")


def kinds_of_rows():
    """The first and the last row of each kind: of those that differ in data, learning rate and numbers alone."""
    kinds = {}
    for name in CIFAR:
        for row in load_table(name).rows:
            if row.function == "equal":
                own = [re.sub(rf"operator\.({'|'.join(NUMBERS)})=.*", r"\1", o) for o in row.overrides]
                kind = name[:3], *(o for o in own if not o.startswith(("data=", "optim.lr=")))
                kinds.setdefault(kind, []).append((name, row.row))
    chosen = sorted({rows[i] for rows in kinds.values() for i in (0, -1)})
    return [pytest.param(*row, marks=pytest.mark.long if row[0] == "vgg11_shuffle" else ()) for row in chosen]


def images_of(side, seed=0):
    """Noise, and squares of few colours, of which many tokens are alike."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(1, 3, side, side, generator=generator)
    flat = torch.randint(0, 4, (1, 3, 4, 4), generator=generator).div(3)
    flat = flat.repeat_interleave(side // 4, 2).repeat_interleave(side // 4, 3)
    return torch.cat([noise, flat]).double() * 2 - torch.tensor([0.9, 1.0, 1.1]).double()[:, None, None]


def built(table, row):
    """Return a row's network in float64, with statistics and slot weights that are not those of the start."""
    torch.manual_seed(0)
    config = compose([*load_table(table).overrides(load_table(table).row(row)), *SMALLER[table[:3]], STEP])
    images = Split(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.arange(2))
    model, _, side = build_model(config, Dataset(images, images, [str(i) for i in range(10)]))
    model = model.double().eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(0, 0.2)
        if name.endswith(("running_var", "slot_weight")):
            value.uniform_(0.5, 1.5)
    return config.operator, model, images_of(side)


def published(table, operator, state, x, **training):
    count = operator.num_candidates
    if table.startswith("vit"):
        kinds = {"mhsa": "attention", "kvt": "kvt", "hybrid_attention": "hybrid"}
        kind = kinds.get(operator.name, operator.candidates)
        return vit(state, x, kind, operator.k, count)
    sample = count if operator.candidates == "random" else None
    position = operator.mix == "concat"
    options = {"position": position, "coordinates": operator.coordinates, "sample": sample, **training}
    options |= {"grid": count if operator.candidates == "grid" else None}
    options |= {"euclidean": operator.similarity == "euclidean"}
    return vgg11(state, x, operator.k, operator.shuffle, **options)


@pytest.mark.parametrize("table, row", kinds_of_rows())
def test_logits_are_those_of_the_published_network(table, row, monkeypatch):
    monkeypatch.setattr(candidates, "random_subset", lambda total, count, device: fixed_subset(total, count))
    operator, model, x = built(table, row)
    with torch.no_grad():
        ours, theirs = model(x), published(table, operator, model.state_dict(), x)
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_what_is_said_of_each_row():
    said = {name: {row.function for row in load_table(name).rows} for name in table_names()}
    assert all("" not in said[name] and "equal" in said[name] for name in CIFAR)
    differ = sum(row.function.startswith("differs: ") for name in CIFAR for row in load_table(name).rows)
    assert differ == 2 + 4 and all(said[name] <= {""} or name in CIFAR for name in said if name != "resnet50_imagenet")
