"""A recipe made for many GPUs, as a contract of one card."""
