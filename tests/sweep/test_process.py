"""One point of a sweep: its process, state, signals, and the GPU that it reserves."""

import json
import os
import signal
import threading

import pytest
from sweeps import FAKE, point_of, wait_for

from convnn.config.compose import CONF_DIR
from convnn.runtime.locks import lock
from convnn.runtime.signals import StopSignals
from convnn.sweep import gpus, process
from convnn.sweep.process import run_point
from convnn.sweep.state import PointState, lock_file, point_state, status_file, stop_file


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(process, "TRAIN", (str(FAKE),))


def test_a_point_is_run_once_and_recorded(fake, tmp_path):
    point = point_of("seed=3")
    assert point_state(tmp_path, point) == PointState("todo")
    assert run_point(tmp_path, point, extra_overrides=("tracker.group=g",)) == "complete"
    assert point_state(tmp_path, point) == PointState("complete", None, 1, 53.0)
    assert run_point(tmp_path, point) == "complete"
    assert (tmp_path / point.folder / "calls").read_text() in ("None g\n", "0 g\n")


@pytest.mark.parametrize("fault, how", [("lost", "has ended without a word"), ("torchrun", "was killed by SIGKILL")])
def test_a_lost_process_of_several_is_no_failure_of_the_run(fault, how, fake, tmp_path):
    point = point_of(f"data.name={fault}")
    assert run_point(tmp_path, point) == "killed"
    assert point_state(tmp_path, point).reason == f"one of the run's processes {how}"


def test_a_locked_point_is_left_alone(fake, tmp_path):
    point = point_of()
    (tmp_path / "status").mkdir()
    with lock(lock_file(tmp_path, point)):
        assert run_point(tmp_path, point) == "running"
    assert not status_file(tmp_path, point).exists()


def test_another_configurations_result_does_not_count(fake, tmp_path):
    point = point_of()
    run_point(tmp_path, point)
    result = tmp_path / point.folder / "result.json"
    result.write_text(result.read_text().replace(point.fingerprint, "0" * 16))
    assert point_state(tmp_path, point).status == "partial"


def test_a_deaf_process_is_killed_after_its_grace(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "GRACE_SECONDS", 1.0)
    point = point_of("data.name=deaf")
    stop = stop_file(tmp_path, "t")

    def ask():
        wait_for("points/*/ready", tmp_path)
        stop.touch()

    thread = threading.Thread(target=ask)
    thread.start()
    assert run_point(tmp_path, point, token="t") == "killed"
    thread.join()
    assert run_point(tmp_path, point, token="t") == "killed"  # the sweep is still asked to stop: nothing begins
    assert point_state(tmp_path, point).attempts == 1


def test_a_workers_signal_reaches_the_run_and_then_its_launcher(fake, tmp_path):
    """As SLURM does before the time limit: USR2, to which submitit's handler answers by requeueing the job."""
    requeued = []
    old = signal.signal(signal.SIGUSR2, lambda signum, frame: requeued.append(status()))
    point = point_of("data.name=sleep")

    def status():
        return json.loads(status_file(tmp_path, point).read_text())["status"]

    def ask():
        wait_for("points/*/ready", tmp_path)
        os.kill(os.getpid(), signal.SIGUSR2)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert run_point(tmp_path, point) == "interrupted"
    finally:
        signal.signal(signal.SIGUSR2, old)
    thread.join()
    assert requeued == ["interrupted"]  # after the checkpoint, not before
    assert (tmp_path / point.folder / "checkpoints" / "last.pt").read_text() == f"after {signal.SIGUSR2}"


def test_slurm_scripts_ask_for_the_signal_and_may_be_requeued():
    slurm = pytest.importorskip("submitit.slurm.slurm")
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        overrides = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=90", "hydra.launcher.gpus_per_node=1"]
        launcher = compose("sweep", overrides, return_hydra_config=True).hydra.launcher
    text = slurm._make_sbatch_string(
        "python job",
        "logs",
        time=launcher.timeout_min,
        gpus_per_node=launcher.gpus_per_node,
        signal_delay_s=launcher.signal_delay_s,
    )
    for option in ("--signal=USR2@", "--time=90", "--gpus-per-node=1", "--open-mode=append"):
        assert option in text


def test_signals_of_the_sweep_are_seen_once_and_restored():
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    with StopSignals(seen.append) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # at once: launchers pass on what the whole group has had already
    assert seen == [signal.SIGTERM] and signals.seen == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


# ------------------------------------------------------------------------------------------- GPUs


def test_no_two_jobs_share_a_gpu_unasked(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5a")
    monkeypatch.setattr(gpus.tempfile, "gettempdir", lambda: str(tmp_path))
    with gpus.reserve_gpu("auto", 1, lambda: False) as a, gpus.reserve_gpu("cuda", 1, lambda: False) as b:
        assert [a, b] == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "GPU-5a"}]
        polls = iter([False, False, True])
        with gpus.reserve_gpu("auto", 1, lambda: next(polls)) as c:
            assert c is None  # waited in vain until it was asked to stop
        with gpus.reserve_gpu("auto", 2, lambda: False) as d, gpus.reserve_gpu("cpu", 1, lambda: True) as e:
            assert d == {"CUDA_VISIBLE_DEVICES": "3"} and e == {}
    with gpus.reserve_gpu("cuda:1", 1, lambda: False) as f:
        assert f == {}
        assert lock(tmp_path / f"convnn-devices-{os.getuid()}" / "GPU-5a.0") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with gpus.reserve_gpu("auto", 1, lambda: True) as g:
        assert g == {}


def test_the_run_sees_the_reserved_gpu(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(gpus.tempfile, "gettempdir", lambda: str(tmp_path))
    point = point_of()
    assert run_point(tmp_path, point) == "complete"
    assert (tmp_path / point.folder / "calls").read_text().startswith("7 ")
