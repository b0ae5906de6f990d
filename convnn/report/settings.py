"""How arms are compared: what scripts/compare.py takes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convnn.config.load import expanded
from convnn.ops.settings import choice, number
from convnn.report.tables import METRICS


@dataclass
class CompareSettings:
    """How arms are compared; ``check_fields`` checks them."""

    baseline: str | None = None
    """Arm that the others are compared with: its name, or key=value[,key=value] that hold for it alone; null: the one
    arm in which no layer is replaced."""
    metric: str = choice(*METRICS)
    """What is compared: top1_last is the last epoch's accuracy on the test set, top1_best_on_test is chosen on it."""
    family: int | None = number(None, 1)
    """Comparisons that were declared, if more than are shown; p values are corrected for that many."""
    effect: float = number(1.0, 0, 100, above=True)
    """Difference in points that the seeds needed are counted for."""
    power: float = number(0.8, 0, 1, above=True, below=True)
    """Chance to find it."""
    level: float = number(0.95, 0, 1, above=True, below=True)
    """Of the intervals; an arm differs where p is below 1 - level."""
    resamples: int = number(4000, 100, 1_000_000)
    """Draws of the bootstrap."""
    seed: int = number(0, 0)
    """Of these draws."""
    tuning: str | None = None
    """Folders, separated by commas, with the sweeps in which settings of the optimizer were tuned."""

    def tuning_folders(self) -> list[Path]:
        """Return the folders of ``tuning``."""
        return [Path(expanded(part, "tuning")) for part in (self.tuning or "").split(",") if part]
