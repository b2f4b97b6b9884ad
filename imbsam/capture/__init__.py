"""A step of the engine as CUDA graphs."""
