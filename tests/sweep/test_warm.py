"""Points that are forked from a process that has loaded torch are what points that are started are."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import TINY, without_times
from sweeps import FAKE, ROOT, alive, point_of, sweep, wait_for

from convnn.runtime.files import read_json
from convnn.sweep import process, warm
from convnn.sweep.process import run_point
from convnn.sweep.state import point_state, stop_file

pytestmark = pytest.mark.skipif(not warm.possible(), reason="points are forked on Linux alone")


@pytest.fixture
def forked(tmp_path, monkeypatch):
    """Let points be forked, of a stand-in for training, and check that nothing is left behind."""
    monkeypatch.setattr(process, "TRAIN", ("-m", FAKE.stem))
    monkeypatch.setattr(warm, "LIBRARIES", ())
    monkeypatch.setenv("PYTHONPATH", f"{FAKE.parent}:{ROOT}")
    monkeypatch.setenv("CONVNN_TEST", str(tmp_path))  # by which its processes are known
    monkeypatch.setattr(warm._Here, "failed", False)
    yield
    warm.close()
    assert alive(tmp_path) == []


def own_process(folder):
    """A point that tells of its process, as a module of the user's."""
    (folder / "told.py").write_text(
        "import json, os, random, signal, sys, threading\n"
        "import numpy\n"
        "told = {'argv': sys.argv, 'path': sys.path, 'cwd': os.getcwd(), 'sid': os.getsid(0) == os.getpid(),\n"
        "    'environment': dict(os.environ), 'main': sys.modules['__main__'].__dict__ is globals(),\n"
        "    'signals': [str(signal.getsignal(s)) for s in sorted(signal.valid_signals())],\n"
        "    'fds': sorted(os.readlink(f'/proc/self/fd/{n}').partition(':')[0] for n in range(3)),\n"
        "    'open': len(os.listdir('/proc/self/fd')), 'threads': threading.active_count(), 'flags': repr(sys.flags),\n"
        "    'buffered': sys.stdout.line_buffering, 'spec': __spec__.name}\n"
        "told['draws'] = [random.random(), numpy.random.random()]\n"
        "print(json.dumps(told))\n"
    )


def end_of(folder, *arguments, warm_start, environment=None):
    """Run a module and return its exit code and output."""
    log = folder / "log"
    code, text, _ = process._run_command(
        [sys.executable, "-m", *arguments], log, environment or dict(os.environ), lambda: None, warm_start
    )
    return code, text


def test_a_forked_process_is_as_a_started_one(forked, tmp_path, monkeypatch):
    own_process(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = []
    for warm_start in (False, True, True):
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(len(found)), process.PARENT: str(os.getpid())}
        code, text = end_of(tmp_path, "told", "a=1", "b c", warm_start=warm_start, environment=environment)
        assert code == 0, text
        found.append(json.loads((tmp_path / "log").read_text().splitlines()[-1]))  # ``text`` has only its end
        assert found[-1]["environment"].pop("CUDA_VISIBLE_DEVICES") == str(len(found) - 1)
        assert int(found[-1]["environment"].pop(process.PARENT)) == (
            os.getpid() if not warm_start else warm._Here.parent.process.pid
        )
    draws = [one.pop("draws") for one in found]
    assert draws[1][0] != draws[2][0] and draws[1][1] != draws[2][1]
    opened = [one.pop("open") for one in found]
    assert max(opened) <= opened[0] + 1  # by which it tells what it has loaded
    assert found[0] == found[1] == found[2]


def test_a_users_module_is_read_anew_for_each_point(forked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "main_one.py").write_text("import own\n")
    texts = []
    for text in ("first", "the second"):
        (tmp_path / "own.py").write_text(f"print('{text}')\n")
        texts.append(end_of(tmp_path, "main_one", warm_start=True)[1].strip())
    assert texts == ["first", "the second"]


@pytest.mark.parametrize(
    "text, code, told",
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit(-1)", 255, ""),
        ("import sys; sys.exit('a word')", 1, "a word"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        ("import os; os._exit(5)", 5, ""),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import os; os.abort()", -signal.SIGABRT, ""),
        ("import atexit; atexit.register(print, 'at the end'); print('first')", 0, "first\nat the end"),
        ("import threading, time\nthreading.Thread(target=lambda: [time.sleep(.3), print('late')]).start()", 0, "late"),
    ],
)
def test_exit_codes_and_last_words(text, code, told, forked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ends.py").write_text(text + "\n")
    found = [end_of(tmp_path, "ends", warm_start=w) for w in (False, True)]
    assert [c for c, _ in found] == [code, code]
    for _, output in found:
        assert told in output.strip() and (told or not output.strip()), output


@pytest.mark.long
def test_states_of_points_are_recorded(forked, tmp_path):
    assert run_point(tmp_path, point_of("seed=3"), warm=True, extra_overrides=("tracker.group=g",)) == "complete"
    pid = warm._Here.parent.process.pid
    for name, status, reason in (
        ("raise", "failed", "RuntimeError: a fault of the test"),
        ("exit", "failed", "exit code 0 without"),
        ("kill", "killed", "killed by SIGKILL (often: out of memory)"),
        ("diverge", "diverged", "loss is not finite at step 3"),
    ):
        point = point_of(f"data.name={name}")
        assert run_point(tmp_path, point, warm=True, extra_overrides=("tracker.group=g",)) == status
        assert reason in point_state(tmp_path, point).reason
        assert (tmp_path / point.log).read_text().startswith(f"$ {sys.executable} -m {FAKE.stem} ")
    assert warm._Here.parent.process.pid == pid  # all from one


def when(path_pattern, tmp_path, call):
    """Call once a file is there, from another thread."""

    def wait():
        wait_for(path_pattern, tmp_path)
        call()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.long
def test_a_stop_reaches_a_forked_point_and_a_deaf_one_is_killed(forked, tmp_path, monkeypatch):
    for token, name, status in (("a", "sleep", "interrupted"), ("b", "deaf", "killed")):
        monkeypatch.setattr(process, "GRACE_SECONDS", 60.0 if name == "sleep" else 0.5)
        point = point_of(f"data.name={name}")
        thread = when(f"{point.folder}/ready", tmp_path, stop_file(tmp_path, token).touch)
        assert run_point(tmp_path, point, token=token, warm=True) == status
        thread.join()


@pytest.mark.long
def test_a_stop_before_the_fork_ends_what_loads(forked, tmp_path, monkeypatch):
    (tmp_path / "slow_one.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
    monkeypatch.setattr(warm, "LIBRARIES", ("slow_one",))
    point, stop = point_of(), stop_file(tmp_path, "t")
    threading.Timer(1.0, stop.touch).start()
    began = time.monotonic()
    assert run_point(tmp_path, point, token="t", warm=True) == "interrupted"
    assert time.monotonic() - began < 20 and "SIGTERM" in point_state(tmp_path, point).reason


def test_a_point_goes_on_where_the_process_that_forks_is_killed(forked, tmp_path, capfd):
    point = point_of("data.name=sleep")

    def kill():
        (tmp_path / point.folder / "mended").touch()
        os.kill(warm._Here.parent.process.pid, signal.SIGKILL)

    thread = when(f"{point.folder}/ready", tmp_path, kill)
    assert run_point(tmp_path, point, warm=True) == "complete"
    thread.join()
    assert (tmp_path / point.folder / "checkpoints" / "last.pt").read_text() == f"after {signal.SIGTERM}"
    assert len((tmp_path / point.folder / "calls").read_text().splitlines()) == 2
    assert run_point(tmp_path, point_of("seed=1"), warm=True) == "complete" and warm._Here.parent is None
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "sweep.warm" in line]
    assert "points start one by one from here on" in line


def test_a_forked_process_whose_parent_has_ended_by_then_ends(tmp_path):
    code = f"from convnn.sweep.warm_parent import as_new; as_new({{}}, 1, 1, {1 << 22}); print('goes on')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, ""), done.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    "text, reason",
    [
        ("raise ImportError('no such library')", "no such library"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()", "threads run"),
        ("import os; os._exit(4)", "exit code 4"),
    ],
)
def test_where_a_library_is_in_the_way_points_are_started(text, reason, forked, tmp_path, monkeypatch, capfd):
    (tmp_path / "library_one.py").write_text(text + "\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
    monkeypatch.setattr(warm, "LIBRARIES", ("library_one",))
    assert run_point(tmp_path, point_of("seed=1"), warm=True) == "complete"
    assert run_point(tmp_path, point_of("seed=2"), warm=True) == "complete"
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "sweep.warm" in line]
    assert reason in line


@pytest.mark.long
def test_another_environment_or_changed_code_begins_anew(forked, tmp_path, monkeypatch):
    pids = []
    for change in ("nothing", "device", "threads", "code"):
        if change == "device":
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        if change == "threads":
            monkeypatch.setenv("OMP_NUM_THREADS", "3")
        if change == "code":
            monkeypatch.setattr(warm, "_code", lambda: (0, 0))
        assert run_point(tmp_path, point_of(f"run.name={change}"), warm=True, device="cpu") == "complete"
        (tmp_path / "points").rename(tmp_path / f"points-{change}")
        pids.append(warm._Here.parent.process.pid)
    assert len(set(pids)) == 3 and pids[0] == pids[1]


def test_nothing_is_forked_where_the_system_cannot(forked, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(warm, "possible", lambda: False)
    assert run_point(tmp_path, point_of(), warm=True) == "complete"
    assert warm._Here.parent is None and "sweep.warm" not in capfd.readouterr().err


@pytest.mark.long
def test_numbers_are_those_of_a_started_process(tmp_path):
    """Twice the same two points with train.py itself, warm and not: results, metrics, weights, environment."""
    own = [o for o in TINY if not o.startswith("tracker")]
    own += ["operator=spectrum", "operator.blend=0.5", "swap.last=2", "train.mixup=0.2", "train.ema=0.9", "seed=0,1"]
    own += ["data.target=faulty.load", f"+data.options.once={tmp_path}/once"]
    runs = {}
    for mode in ("auto", "false"):
        (tmp_path / mode).mkdir()
        driver = f"{ROOT}/tests/support"
        code, text = sweep(driver, tmp_path / mode, f"sweep.warm={mode}", *own)
        assert code == 0 and "2 complete" in text and "one by one" not in text, text
        runs[mode] = sorted((tmp_path / mode).glob("sweep/points/*"))
    for one, other in zip(runs["auto"], runs["false"], strict=True):
        same_run(one, other)
    assert alive(tmp_path) == []


def same_run(one: Path, other: Path) -> None:
    import torch

    times = ("peak_memory", "images_per_second", "finished", "started", "command", "memory", "dir")
    for name in ("result.json", "env.json"):
        found = [
            {k: v for k, v in without_times(read_json(p / name)).items() if not any(t in k for t in times)}
            for p in (one, other)
        ]
        assert found[0] == found[1]
    rows = [[json.loads(line) for line in (p / "metrics.jsonl").read_text().splitlines()] for p in (one, other)]
    kept = [[{k: v for k, v in without_times(r).items() if not any(t in k for t in times)} for r in x] for x in rows]
    assert kept[0] == kept[1] and len(kept[0]) == 2
    weights = [torch.load(p / "checkpoints" / "last.pt", map_location="cpu", weights_only=False) for p in (one, other)]
    assert_equal(*(w["model"] for w in weights))


def assert_equal(one, other):
    assert one.keys() == other.keys() and len(one)
    for name, tensor in one.items():
        assert tensor.equal(other[name]), name
