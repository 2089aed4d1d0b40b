"""Which samples an update takes, and in which pieces (no torch)."""
