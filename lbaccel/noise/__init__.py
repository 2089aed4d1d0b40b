"""The noise scale of gradients, and what follows from it for the batch."""
