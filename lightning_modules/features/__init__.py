"""Cached features of a frozen network: computed once, and heads trained on them."""
