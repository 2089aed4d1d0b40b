"""A run on disk: written while it trains, read again afterwards."""
