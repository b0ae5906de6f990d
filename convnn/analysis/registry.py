"""The analyses by name. Loads no torch: an analysis is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from convnn.config.keys import nearest
from convnn.errors import ConfigError

if TYPE_CHECKING:
    from convnn.analysis.base import Analysis

ANALYSES = {
    "erf": "which pixels the central unit depends on, by depth (Luo et al. 2016)",
    "distance": "how far away the neighbours of a query are, per head and layer (Raghu et al. 2021)",
    "fourier": "log-amplitude of the feature maps by frequency and depth (Park & Kim 2022)",
    "noise": "accuracy with noise of one band of frequencies (Yin et al. 2019; Park & Kim 2022)",
    "variance": "how much the tokens of an image differ from each other, by depth (Park & Kim 2022)",
    "cka": "how alike the features of two layers, or of two networks, are (Kornblith et al. 2019)",
    "calibration": "whether its confidence is its accuracy: ECE, NLL, Brier score (Guo et al. 2017)",
    "classes": "accuracy of each class, and which classes are taken for which",
    "robustness": "errors on corrupted images, by kind and severity (Hendrycks & Dietterich 2019)",
    "hessian": "largest eigenvalues of the loss's Hessian (Yao et al. 2020, Park & Kim 2022)",
    "path": "loss on the straight way from the first weights to the last (Goodfellow et al. 2015)",
}
"""What ``convnn.analysis.NAME`` shows, a line each, in the order of the documentation."""


def chosen(names: list[str] | None) -> list[str]:
    """Return the names of the analyses that are asked for, each once; None: all.

    Raises:
        ConfigError: for an unknown name, or none.
    """
    if names is None:
        return list(ANALYSES)
    if not names:
        raise ConfigError(f"analyses=[] names none; there are {', '.join(ANALYSES)}")
    for name in names:
        if name not in ANALYSES:
            raise ConfigError(f"analyses={name} is not one of {', '.join(ANALYSES)}{nearest(name, ANALYSES)}")
    return list(dict.fromkeys(names))


def load_analysis(name: str) -> Analysis:
    """Return an analysis by its name."""
    return importlib.import_module(f"convnn.analysis.{name}").ANALYSIS
