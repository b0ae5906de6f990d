"""What all programs share: how they end."""

import signal
import subprocess
import sys

from convnn.cli.early import _CIFAR

CODE = """
from convnn.cli.program import run_program
run_program(lambda argv: [print("line", flush=True) for _ in range(100000)] and None)
"""


def test_a_reader_that_has_read_enough_is_no_error():
    """As in ``program | head -1``."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CODE], **pipes) as program:
        assert program.stdout.readline() == "line\n"
        program.stdout.close()
        assert program.stderr.read() == ""
    assert program.returncode == 128 + signal.SIGPIPE


def test_the_archives_that_early_checks_name_are_torchvisions():
    from torchvision.datasets import CIFAR10, CIFAR100

    known = {"cifar10": CIFAR10, "cifar100": CIFAR100}
    assert {n: (kind.base_folder, kind.filename, kind.tgz_md5) for n, kind in known.items()} == _CIFAR
