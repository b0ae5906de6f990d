"""A process that ends with the one that started it."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from convnn.runtime.signals import AGENT, PARENT

CHILD = """
import signal, sys, time
from convnn.runtime.signals import follow_parent
signal.signal(signal.SIGTERM, lambda *_: (print("TERM", flush=True), sys.exit(7)))
follow_parent()
print("begun", flush=True)
time.sleep(60)
"""
STARTER = """
import os, subprocess, sys, time
environment = os.environ | ({sys.argv[2]: str(os.getpid())} if sys.argv[2] else {})
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent died")
@pytest.mark.parametrize("variable", [PARENT, AGENT, ""])
def test_a_process_is_told_that_its_parent_was_killed(variable):
    environment = {name: value for name, value in os.environ.items() if name not in (PARENT, AGENT)}
    given = {"env": environment, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    starter = subprocess.Popen([sys.executable, "-c", STARTER, CHILD, variable], **given)
    try:
        assert starter.stdout.readline() == "begun\n"
        starter.kill()
        if variable:  # the end of the output: the child, which held it too, has gone
            assert starter.stdout.read() == "TERM\n"
        else:
            os.killpg(starter.pid, 0)  # it is still there
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(starter.pid, signal.SIGKILL)
