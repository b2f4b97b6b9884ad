"""The groups of classes by training samples, and their colours; torch-free, as `imbsam report` is."""

GROUPS = ("many", "medium", "few", "all")
"""More than ``many`` training samples, the rest, fewer than ``few``; and all classes."""

GROUP_COLOURS = {"many": "#0072B2", "medium": "#E69F00", "few": "#D55E00", "all": "#404040"}
"""Okabe and Ito's colours, which colour-blind readers can tell apart."""
