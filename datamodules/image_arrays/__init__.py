"""Data sets of small images that fit into memory: digits, CIFAR and packed files."""
