"""Callbacks: what is printed, written, measured or changed in the course of a run."""
