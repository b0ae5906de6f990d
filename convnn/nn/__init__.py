"""Layers with parameters, drop-ins for ``nn.Conv2d`` and timm's ``Attention``."""
