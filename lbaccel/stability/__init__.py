"""The largest learning rate at which training stays stable, predicted and measured."""
