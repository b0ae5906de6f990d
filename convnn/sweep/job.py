"""One job of a sweep as Hydra's launchers call it, and the call to Hydra. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from convnn.config.compose import from_hydra
from convnn.config.folders import CONF_DIR
from convnn.config.identity import fingerprint
from convnn.config.overrides import is_sweep, key_of, quoted
from convnn.errors import ConfigError
from convnn.runs.data_record import RecordReader
from convnn.runs.status import COMPLETE, FAILED, INVALID
from convnn.runtime.files import write_json
from convnn.sweep.budget import Budget
from convnn.sweep.options import SweepConfig
from convnn.sweep.plan import Point, load_point, point_name
from convnn.sweep.process import Start, run_point
from convnn.sweep.same_data import check_point
from convnn.sweep.state import point_state, stop_file, sweep_has_ended

_DEVICES, _JOBS, _ALL = "CONVNN_SWEEP_DEVICES", "CONVNN_SWEEP_JOBS", "all"
"""Environment variables by which workers know what GPUs the sweep sees, and of how many jobs they are."""


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="sweep")
def main(values: DictConfig) -> float | str | None:
    """Run the point that Hydra composed in a process of its own; return top-1 in percent, else the status.

    It never raises: a launcher would give up the other jobs.
    """
    sweep = values.sweep
    folder = Path(sweep.dir)
    try:
        point = load_point(folder, sweep.point[1:]) if sweep.point else _point_of_other_sweeper(values, folder)
    except ConfigError as error:  # only where another sweeper than ours chose the point
        print(f"error: {error}", file=sys.stderr)
        return _record_invalid(folder, sweep.token, str(error))
    extra = tuple(
        o for o in (f"tracker.group={quoted(sweep.name)}",) if "tracker.group" not in map(key_of, point.overrides)
    )
    launcher = HydraConfig.get().launcher
    local = launcher._target_.endswith(".LocalLauncher")
    if local and launcher.get("gpus_per_node") is None:
        _show_devices_again()
    parallel = int(os.environ.get(_JOBS, 1)) if local else int(launcher.get("n_jobs") or 1)
    budget = Budget(folder, sweep.deadline)
    status = run_point(
        folder,
        point,
        token=sweep.token,
        extra_overrides=extra,
        device=values.device if not sweep.point else _device(point),
        jobs_per_device=sweep.jobs_per_device,
        parallel=parallel,
        warm=sweep.warm == "auto" and "submitit" not in launcher._target_,  # whose jobs are of one point each
        budget=budget,
        start=Start(sweep.processes or 1),
    )
    if str(sweep.token).endswith(f"-{os.getpid()}") and (budget.spent() or stop_file(folder, sweep.token).exists()):
        sys.exit()  # the launcher is the sweep's own process, and would compose all points that are left
    if sweep_has_ended(sweep.token):
        os._exit(1)  # a worker without a sweep would wait for ever to hand over its result
    return point_state(folder, point).top1 if status == COMPLETE else status


def _show_devices_again() -> None:
    """Let a worker of submitit on this machine see the sweep's GPUs; it hides all where none are asked for."""
    devices = os.environ.get(_DEVICES, _ALL)
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if devices != _ALL:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices


def _device(point: Point) -> str:
    given = next((o for o in point.overrides if key_of(o) == "device"), "device=auto")
    return str(OverridesParser.create().parse_override(given).value())


def _record_invalid(folder: Path, token: str, reason: str) -> str:
    (folder / "status").mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(reason.encode()).hexdigest()[:8]
    record = {"status": FAILED, "reason": reason, "name": INVALID, "log": None, "token": token}
    write_json(folder / "status" / f"{INVALID}-{name}.json", record)
    return INVALID


def _point_of_other_sweeper(values: DictConfig, folder: Path) -> Point:
    """Return the point that a sweeper other than ours asked for.

    Raises:
        ConfigError: if its configuration cannot work, or it is complete with other data.
    """
    plain = OmegaConf.to_container(values, resolve=True)
    assert isinstance(plain, dict)
    plain.pop("sweep")
    config = from_hydra(OmegaConf.create(plain))
    overrides = tuple(o for o in HydraConfig.get().overrides.task if not is_sweep(o))
    point = Point(point_name(config), fingerprint(config), overrides)
    check_point(folder, point, config.data, RecordReader())
    return point


def launch(argv: list[str]) -> None:
    """Hand a command line to Hydra, which calls ``main`` for every job through its launcher."""
    os.environ[_DEVICES] = os.environ.get("CUDA_VISIBLE_DEVICES", _ALL)
    os.environ[_JOBS] = str(max((arg.count(",") + 1 for arg in argv if key_of(arg) == "sweep.point"), default=1))
    sys.argv[1:] = argv
    main()


def job_options(options: SweepConfig, token: str, budget: Budget) -> list[str]:
    """Return what a job has to know of the sweep."""
    return [
        *([] if budget.deadline is None else [f"sweep.deadline={budget.deadline}"]),
        f"sweep.dir={quoted(options.dir)}",
        f"sweep.name={quoted(options.name)}",
        f"sweep.jobs_per_device={options.jobs_per_device}",
        f"sweep.processes={'null' if options.processes is None else options.processes}",
        f"sweep.warm={options.warm}",
        f"sweep.token={quoted(token)}",
    ]
