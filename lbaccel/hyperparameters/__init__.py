"""Hyper-parameters carried from one global batch to another, each by a rule of its own."""
