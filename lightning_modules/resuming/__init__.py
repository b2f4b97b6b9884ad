"""What lets a run be killed at any moment and resumed: checkpoints, the log, signals."""
