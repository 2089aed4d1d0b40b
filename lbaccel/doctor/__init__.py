"""Checks of an environment, a config and a script for errors that no message reports."""
