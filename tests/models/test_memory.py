"""The memory of a training step, told in advance, against what autograd keeps and, on a GPU, against the peak."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from convnn import ConvNN2d, swap_layers
from convnn.models import memory
from convnn.models.cost import count_memory
from convnn.models.memory import kept_for_backward, training_memory

NETS = {
    "resnet": lambda: timm.create_model("resnet18", num_classes=10, channels=(8, 8, 16, 16), stem_width=8),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, embed_dim=24),
}
SWAPS = [
    ("resnet", {"k": 9}),
    ("resnet", {"k": 5, "weighting": "softmax", "blend": 0.5, "aggregation": "separable"}),
    ("resnet", {"candidates": "random", "num_candidates": 12, "k_policy": "clamp", "weighting": "softmax"}),
    ("vit", {"kind": "attention", "target": "convnn.ConvNNAttention", "k": 9, "weighting": "softmax"}),
]


@pytest.mark.parametrize("net, operator", SWAPS, ids=lambda o: "" if isinstance(o, dict) else o)
def test_what_is_kept_is_counted(net, operator):
    """Without computing, to the byte; and so is what the plain network keeps."""
    torch.manual_seed(0)
    model, plain = NETS[net](), NETS[net]()
    report = swap_layers(model, {"match": "*.conv*" if net == "resnet" else "*.attn"}, operator)
    images = torch.randn(6, 3, 32, 32)
    draws = torch.get_rng_state()
    told = count_memory(model, 3, 32, report, 6).memory
    assert torch.equal(torch.get_rng_state(), draws) and model.training
    assert (told.kept, told.kept_plain) == tuple(sum(kept_for_backward(m, images)) for m in (model, plain))
    assert f"{6} images" in str(count_memory(model, 3, 32, report, 6)) and told.extra > 0


def test_a_layer_by_hand():
    """Kept are tokens with their ring, the rows of the neighbours, and a copy of the slots; never the neighbours."""
    layer = ConvNN2d(3, 4, 9, bias=False)
    tokens, rows, slots = 5 * 10 * 10 * 3, 5 * 64 * 9, 4 * 27
    kept = kept_for_backward(layer, torch.randn(5, 3, 8, 8))
    assert sorted(kept) == sorted(4 * count for count in (tokens, rows, slots))
    told = training_memory(nn.Sequential(layer), {"0": nn.Conv2d(3, 4, 3, padding=1)}, (3, 8, 8), 5)
    assert (told.kept, told.kept_plain) == (4 * (tokens + rows + slots), 4 * 5 * 3 * 64)
    assert told.working == max(5 * 64 * 100 * 24, 3 * 4 * 5 * 64 * 9 * 3)
    assert told.extra == told.kept - told.kept_plain + told.working


def test_what_works_is_bounded():
    """However large the batch, a layer holds no more than a chunk of scores or some of gathered neighbours."""
    model = nn.Sequential(ConvNN2d(3, 4, 9))
    plain = {"0": nn.Conv2d(3, 4, 3, padding=1)}
    small, large = (training_memory(model, plain, (3, 32, 32), n).working for n in (1 << 16, 1 << 20))
    assert small == large == max(3 * memory.CHUNK_BYTES, 24 * memory.CHUNK_SCORES_ELSEWHERE)


def test_nothing_replaced_or_countable_nothing_told(monkeypatch):
    model = NETS["resnet"]()
    report = swap_layers(model, {"match": "layer1.*", "min_kernel": 3}, {"k": 9})
    monkeypatch.setattr("convnn.models.cost.training_memory", lambda *_: 1 / 0)
    assert count_memory(model, 3, 32, report, 4) is report
    assert "memory" not in str(report)


def peak(model, images, labels):
    """Return the bytes that a training step allocates at most, gradients and the optimizer's state among them."""
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("operator", [{"k": 9}, {"k": 9, "blend": 0.5, "weighting": "softmax"}])
@pytest.mark.parametrize("amp", [False, True])
def test_the_peak_on_the_gpu(operator, amp):
    """VGG-11, batch of 256, 32x32: at most 1.5 times the peak of the plain network and what was counted."""
    images, labels = torch.randn(256, 3, 32, 32, device="cuda"), torch.randint(10, (256,), device="cuda")
    found = {}
    for name in ("plain", "swapped"):
        model = timm.create_model("vgg11", num_classes=10).to("cuda")
        if name == "swapped":
            told = count_memory(model, 3, 32, swap_layers(model, {"match": "features.*"}, operator), 256).memory
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            found[name] = peak(model, images, labels)
        del model
        torch.cuda.empty_cache()
    print(f"\n{operator} amp={amp}: { ({k: v >> 20 for k, v in found.items()}) } MiB, counted {told}")
    assert found["swapped"] <= 1.5 * found["plain"] + told.extra
