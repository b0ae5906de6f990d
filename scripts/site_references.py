"""The pages of the site that are made from the code: all configuration keys, and the public names."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import convnn
from convnn.config.reference import Group, Key, groups
from convnn.sweep.options import SweepConfig

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "scripts/evaluate.py": "convnn.cli.evaluate",
    "scripts/predict.py": "convnn.cli.predict",
    "scripts/prepare_data.py": "convnn.cli.prepare_data",
    "scripts/visualize.py": "convnn.cli.visualize",
    "scripts/report.py": "convnn.cli.report",
    "scripts/status.py": "convnn.cli.status",
    "scripts/compare.py": "convnn.cli.compare",
    "scripts/analyze.py": "convnn.cli.analyze",
    "scripts/export.py": "convnn.cli.export",
    "scripts/reproduce.py": "convnn.cli.reproduce",
    "scripts/benchmark.py": "benchmark",
    "scripts/gpu_check.py": "gpu_check",
    "scripts/fault_trials.py": "fault_trials",
    "scripts/survey_backbones.py": "survey_backbones",
    "scripts/draw_spectrum.py": "draw_spectrum",
    "scripts/collect_published.py": "collect_published",
}
"""Modules of the programs whose options are a dataclass ``Options``."""
TITLES = {
    "models": "Models: swap, ask, move",
    "nn": "Layers",
    "ops": "The operator",
    "config": "Configuration",
    "data": "Data",
    "figures": "Figures",
    "train": "Finished runs",
    "errors": "Errors",
}


def keys_page() -> str:
    """Return the reference of all keys: those of a run, of a sweep, and of the other programs."""
    parts = [
        "# Configuration keys",
        "Every key with its type, its default in the schema and its meaning, made from the schema itself. "
        "The file chosen in a group, such as `conf/data/cifar10.yaml`, stands over the default, the command line over "
        "both ([configuration.md](configuration.md#how-a-configuration-is-composed)).",
    ]
    for group in groups():
        parts += [f"## {group.name or 'Of the run'}", *_group(group)]
    for group in groups(SweepConfig, "sweep"):
        parts += [f"## {group.name}", "Of `sweep.py` besides the keys of a run.", *_group(group)]
    parts += ["## Options of the programs", "Given as `key=value`, as those above."]
    for program, group in program_groups():
        parts += [f"### {program}", _table(group.keys, f"{Path(program).stem}.")]
    return "\n\n".join(parts) + "\n"


def program_groups() -> Iterator[tuple[str, Group]]:
    """Yield the options of each program whose options are a dataclass."""
    if str(ROOT / "scripts") not in sys.path:
        sys.path.append(str(ROOT / "scripts"))
    for program, module in PROGRAMS.items():
        for group in groups(importlib.import_module(module).Options):
            yield program, group


def _group(group: Group) -> Iterator[str]:
    yield group.about
    yield _table(group.keys, "")


def _table(keys: tuple[Key, ...], prefix: str) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        default = f"`{key.default}`" if key.default else "required"
        cells = (f'`{key.name}`{{ id="{prefix}{key.name}" }}', _type(key), default, key.about)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _type(key: Key) -> str:
    if key.choices:
        return ", ".join(f"`{choice}`" for choice in key.choices)
    return f"{key.type}, {key.range}" if key.range else key.type


def api_page() -> str:
    """Return the reference of the public names, in groups by the package that each comes from."""
    homes = _homes()
    if missing := set(convnn.__all__) - set(homes) - {"__version__"}:
        raise ValueError(f"convnn/__init__.py does not say where {', '.join(sorted(missing))} comes from")
    parts = [
        "# Python API",
        "The names of `import convnn`, from their docstrings. How to use them: [library.md](library.md).",
    ]
    for package, title in TITLES.items():
        names = [name for name, home in homes.items() if home.split(".")[1] == package]
        parts += [f"## {title}", *(f"::: {homes[name]}.{name}" for name in sorted(names))]
    return "\n\n".join(parts) + "\n"


def _homes() -> dict[str, str]:
    """Return the module of each public name, as convnn/__init__.py tells it to type checkers."""
    tree = ast.parse((ROOT / "convnn" / "__init__.py").read_text(encoding="utf-8"))
    return {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("convnn.")
        for alias in node.names
        if alias.name in convnn.__all__ and alias.name != "__version__"
    }
