"""LightningModules, backbones and the command line for training on long-tailed data."""
