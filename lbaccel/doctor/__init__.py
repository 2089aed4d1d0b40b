"""What is known to go wrong in silence with an environment, a config and a script, looked up."""
