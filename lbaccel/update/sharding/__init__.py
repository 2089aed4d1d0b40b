"""Where gradients, weights and optimizer state lie: on every rank, under ZeRO, under FSDP2."""
