"""Differences between arms of an experiment: intervals, tests, seeds needed, cost. Imports numpy and scipy alone."""
