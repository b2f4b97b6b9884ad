"""Runs that may be killed at any moment: checkpoints, the log, signals."""
