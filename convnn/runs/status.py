"""The states of a run, as result.json, a sweep's status files and reports name them. Imports nothing."""

COMPLETE, INTERRUPTED, RUNNING, TODO = "complete", "interrupted", "running", "todo"
QUEUED, CANCELLED = "queued", "cancelled"
"""Of a point that is a job of a cluster."""
PARTIAL = "partial"
"""A point of a sweep that has checkpoints, and no process that a status file tells of."""
UNFINISHED = "unfinished"
"""Begun, and neither running nor ended."""
DAMAGED = "damaged"
"""Its files cannot be read, or contradict each other."""
INVALID = "invalid"
"""A point of a sweep whose configuration cannot work; it is never run."""
FAILED, KILLED, DIVERGED = "failed", "killed", "diverged"
FAILURES = (FAILED, KILLED, DIVERGED)
"""How a run's process ends without a result that counts."""
UNUSABLE = (*FAILURES, DAMAGED)
"""Runs that never count in a mean."""
