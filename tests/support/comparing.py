"""Comparing a module with a reference: outputs and every gradient."""

import torch

TOLERANCE = 1e-10


def close(a, b):
    assert a.shape == b.shape
    assert (a - b).abs().max() < TOLERANCE, f"largest error {(a - b).abs().max():.1e}"


def compare(module, reference, x):
    """Compare outputs and the gradients of the input and all parameters of two functions of one module."""
    results = []
    for function in (module, reference):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        cotangent = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
        (y * cotangent).sum().backward()
        results.append((y.detach(), leaf.grad, {n: p.grad for n, p in module.named_parameters()}))
    (y1, g1, p1), (y2, g2, p2) = results
    close(y1, y2)
    close(g1, g2)
    assert p1.keys() == p2.keys()
    for name in p1:
        assert p1[name] is not None, f"{name} got no gradient"
        close(p1[name], p2[name])
