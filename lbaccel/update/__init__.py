"""The exact update: one global batch in micro-batches, with the result of the whole."""
