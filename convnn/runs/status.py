"""The states of a run, as result.json, a sweep's status files and reports name them. Imports nothing."""

COMPLETE, INTERRUPTED, RUNNING, TODO = "complete", "interrupted", "running", "todo"
UNFINISHED = "unfinished"
"""Begun, and neither running nor ended."""
DAMAGED = "damaged"
"""Its files cannot be read, or contradict each other."""
FAILED = ("failed", "killed", "diverged")
"""How a run's process ends without a result that counts."""
UNUSABLE = (*FAILED, DAMAGED)
"""Runs that never count in a mean."""
