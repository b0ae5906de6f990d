"""SLURM's commands and what they say."""

import subprocess

import pytest

from convnn.errors import ConfigError
from convnn.runtime.scheduler import Job, SchedulerError, Slurm
from convnn.sweep.sbatch import batch_script, read_settings

SQUEUE = """35|0|RUNNING|1|node1|None|
35|1|COMPLETING|0|node2|None|
35|7|PENDING|2||BeginTime|
36|N/A|CANCELLED|0||Dependency|
35|2|COMPLETED|0|node1|None|
"""


def test_the_queue_is_read():
    calls = []
    slurm = Slurm(lambda command, text: calls.append(list(command)) or SQUEUE)
    jobs = slurm.jobs(["a-1", "b-2"])
    assert "--name=a-1,b-2" in calls[0] and "--states=all" in calls[0]
    assert jobs["35_0"] == Job("RUNNING", 1, "node1", "None") and jobs["36"].state == "CANCELLED"
    assert [n for n, j in jobs.items() if j.alive] == ["35_0", "35_1", "35_7"]
    assert [n for n, j in jobs.items() if j.waiting] == ["35_7"]
    assert slurm.jobs([]) == {} and len(calls) == 1


def test_accounts_are_read_where_there_are_some():
    said = "35_0|COMPLETED\n35_[2-3,6%2]|CANCELLED by 0\n36|NODE_FAIL\n"
    found = Slurm(lambda command, text: said).ended(["35_0", "35_2"])
    assert found["35_0"] == "COMPLETED" and [found[f"35_{i}"] for i in (2, 3, 6)] == ["CANCELLED"] * 3

    def disabled(command, text):
        raise SchedulerError("sacct: Slurm accounting storage is disabled")

    assert Slurm(disabled).ended(["35_0"]) == {}


RECORDED = """1_0|COMPLETED
1_1|COMPLETED
2_0|COMPLETED
2_1|FAILED
2_2|COMPLETED
4_0|CANCELLED by 0
4_1|CANCELLED by 0
4_2|CANCELLED by 0
4_[2-3,7%2]|CANCELLED by 0
10|COMPLETED
12_0|PREEMPTED
12_1|PREEMPTED
15|COMPLETED
3|TIMEOUT
13|CANCELLED by 0
16|NODE_FAIL
18|TIMEOUT
17|PENDING
"""
"""What SLURM 22.05 with slurmdbd said: of array 4, of eight tasks, 1 was cancelled as it ran and 4 to 6 as they waited,
then the whole; 10 was requeued, 3 and 13 were preempted and requeued before, 17 lost its node and was requeued."""


def test_real_accounts_are_read():
    calls = []
    slurm = Slurm(lambda command, text: calls.append(list(command)) or RECORDED)
    numbers = [f"4_{i}" for i in range(8)] + ["1_1", "2_1", "3", "10", "12_0", "13", "16", "17", "99_0"]
    found = slurm.ended(numbers)
    assert "--jobs=1,10,12,13,16,17,2,3,4,99" in calls[0]
    assert {found.pop(f"4_{i}") for i in range(8)} == {"CANCELLED"}  # 4 to 6 have no row
    assert [found.get(n) for n in numbers[8:]] == [
        "COMPLETED", "FAILED", "TIMEOUT", "COMPLETED", "PREEMPTED", "CANCELLED", "NODE_FAIL", "PENDING", None,
    ]  # fmt: skip
    own = Slurm(lambda *_: "4_2|NODE_FAIL\n4_[2-3,7%2]|CANCELLED by 0\n").ended(["4_2", "4_3"])
    assert own == {"4_2": "NODE_FAIL", "4_3": "CANCELLED", "4_7": "CANCELLED"}


def test_a_job_is_handed_in():
    given = []
    assert Slurm(lambda command, text: given.append((list(command), text)) or "35;cluster\n").submit(["--x"], "s") == 35
    assert given == [(["sbatch", "--parsable", "--x"], "s")]
    with pytest.raises(SchedulerError, match="names no job"):
        Slurm(lambda command, text: "").submit([], "")
    assert Slurm(lambda command, text: "MaxArraySize            = 201\n").largest_array() == 201


def test_errors_are_one_line(monkeypatch):
    def run(command, **options):
        assert not [key for key in options["env"] if key.startswith(("SLURM_", "SQUEUE_")) and key != "SLURM_CONF"]
        return subprocess.CompletedProcess(command, 1, "", "squeue: error: x\nslurm_load_jobs error: No contact\n")

    monkeypatch.setenv("SLURM_JOB_ID", "3")
    monkeypatch.setenv("SQUEUE_PARTITION", "urgent")
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SchedulerError, match=r"^squeue: x; slurm_load_jobs error: No contact$"):
        Slurm().jobs(["a"])
    assert not Slurm().requeue("3_1")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("sbatch: unrecognized option '--foo=1'\nTry \"sbatch --help\" for more\n", "unrecognized option '--foo=1'"),
        ("sbatch: error: QOSMax\nsbatch: error: Batch job failed: over it\n", "QOSMax; Batch job failed: over it"),
        ("", "exit code 1"),
    ],
)
def test_what_sbatch_complains_of_is_told(said, message, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(SchedulerError) as told:
        Slurm().submit([], "")
    assert str(told.value) == f"sbatch: {message}"


def test_jobs_are_found_by_number_whatever_their_name_and_partition():
    calls = []

    def run(command, text):
        calls.append(list(command))
        if "--jobs=36" in command:
            raise SchedulerError("squeue: slurm_load_jobs error: Invalid job id specified")
        return SQUEUE.replace("36|N/A|CANCELLED|0||Dependency|\n", "")

    slurm = Slurm(run)
    assert set(slurm.by_number(["35_7", "36_1", "35_0"])) == {"35_0", "35_1", "35_2", "35_7"}
    assert [command[-1] for command in calls] == ["--jobs=35", "--jobs=36"] and all("--all" in c for c in calls)
    assert slurm.job("35_7") == Job("PENDING", 2, "", "BeginTime") and slurm.job("36_1") is None
    silent = Slurm(lambda *_: (_ for _ in ()).throw(SchedulerError("squeue: Socket timed out")))
    with pytest.raises(SchedulerError, match="timed out"):
        silent.by_number(["35_7"])


def test_settings_become_options_of_sbatch(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    own = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=90", "hydra.launcher.gpus_per_node=2"]
    own += ["hydra.launcher.mem_gb=8", "hydra.launcher.partition=long", "hydra.launcher.nodes=2"]
    own += ["hydra.launcher.array_parallelism=7", "hydra.launcher.setup=[module load cuda]"]
    own += ["+hydra.launcher.additional_parameters={mail-user: a@b.c, exclusive: true}"]
    settings = read_settings(own)
    wanted = ["--time=90", "--requeue", "--signal=USR2@120", "--ntasks-per-node=1", "--gpus-per-node=2", "--mem=8G"]
    assert {*wanted, "--nodes=2", "--partition=long", "--mail-user=a@b.c", "--exclusive"} <= set(settings.options)
    assert (settings.parallel, settings.nodes, settings.gpus) == (7, 2, 2) and settings.setup == ["module load cuda"]
    assert not [o for o in settings.light if "gpu" in o] and "--partition=long" in settings.light
    script = batch_script(tmp_path, "name", settings.setup, cpus=True)
    assert script.startswith("#!/bin/bash\nmodule load cuda\nexec srun ") and "--cpus-per-task=$SLURM" in script
    assert (
        "--signal=USR2@15" in read_settings([own[0], "hydra.launcher.timeout_min=1"]).options
    )  # time to train is left
    more = "{reservation: r, mem-per-cpu: 1G, exclusive: false, nice: 0, wckey: null}"
    settings = read_settings([own[0], f"+hydra.launcher.additional_parameters={more}"])
    assert {"--reservation=r", "--mem-per-cpu=1G", "--nice=0"} <= set(settings.options)
    assert {"--reservation=r", "--nice=0"} <= set(settings.light) and not [o for o in settings.light if "mem" in o]
    assert not [o for o in settings.options if "exclusive" in o or "wckey" in o]
    with pytest.raises(ConfigError, match=r"additional_parameters\.job-name: a sweep sets that itself"):
        read_settings([own[0], "+hydra.launcher.additional_parameters={job_name: x}"])
    with pytest.raises(ConfigError, match="tasks_per_node"):
        read_settings([own[0], "hydra.launcher.tasks_per_node=2"])
