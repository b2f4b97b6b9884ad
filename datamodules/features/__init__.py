"""Cached features of a frozen network."""
