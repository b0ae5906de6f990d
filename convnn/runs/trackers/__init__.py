"""The tools that a run can be watched in, one class each, all with the methods of ``base.RunTracker``."""
