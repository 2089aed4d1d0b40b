"""Data: sources, order and randomness keyed by sample, augmentation, the loader."""
