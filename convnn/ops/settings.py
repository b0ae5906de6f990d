"""How neighbours are chosen and mixed, as values. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """How neighbours are chosen. The fields are those of ``convnn.config.OperatorConfig``."""

    similarity: str = "cosine"
    mix: str = "sum"
    distance: str = "chebyshev"
    candidates: str = "all"
    num_candidates: int = 32
    eval_candidates: str = "same"
    candidate_seed: int = 0
    pad_candidates: bool = True
    self_first: bool = True
    slots: str = "rank"
    k_policy: str = "error"
