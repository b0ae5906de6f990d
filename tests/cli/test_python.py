"""Which versions of Python the package says that it takes."""

import argparse
import tomllib

from hydra._internal.utils import get_args_parser
from programs import ROOT


def fails_the_check_of_help(parser):
    """Do what ``ArgumentParser.add_argument`` of Python 3.14 does with the help of every argument."""
    formatter = argparse.HelpFormatter(prog="x")
    for action in parser._actions:
        try:
            if action.help:
                formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            return True
    return False


def test_python_is_bounded_for_as_long_as_hydra_needs_it():
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert asked == (">=3.11,<3.14" if fails_the_check_of_help(get_args_parser()) else ">=3.11")
    assert not fails_the_check_of_help(argparse.ArgumentParser())
