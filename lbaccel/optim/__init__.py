"""How fast: learning-rate rules, schedules, warmup, momentum, AdaScale, optimizers."""
