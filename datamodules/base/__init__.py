"""What all long-tailed data sets share: the DataModule, and the counts and draws of a long tail."""
