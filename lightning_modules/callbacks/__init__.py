"""Callbacks: what is printed, written, measured or scheduled during a run."""
