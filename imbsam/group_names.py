"""The names of the groups of classes and of the measures over the classes; torch-free, as `imbsam report` is."""

GROUPS = ("many", "medium", "few", "all")
"""More than ``many`` training samples, the rest, fewer than ``few``; and all classes."""

GROUP_COLOURS = {"many": "#0072B2", "medium": "#E69F00", "few": "#D55E00", "all": "#404040"}
"""Okabe and Ito's colours, which colour-blind readers can tell apart."""

CLASS_MEASURES = {
    "lowest_recall": "lowest recall",
    "harmonic_mean": "harmonic mean recall",
    "geometric_mean": "geometric mean recall",
    "macro_f1": "macro-F1",
}
"""What :class:`~imbsam.class_measures.ClassMeasures` computes over all classes, and its headings."""

TEST_RATIOS = (2, 5, 10, 25, 50)
"""Imbalance ratios of the long-tailed test sets of SADE (Zhang et al., NeurIPS 2022), forward and backward."""

TEST_DISTRIBUTIONS = (
    *(f"forward_{ratio}" for ratio in reversed(TEST_RATIOS)),
    *(f"backward_{ratio}" for ratio in TEST_RATIOS),
)
"""Their names in the log, from the most forward to the most backward; the balanced one between them is "all"."""
