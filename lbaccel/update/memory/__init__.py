"""Memory: what running out of it looks like, budgets, and the micro-batch that fits."""
