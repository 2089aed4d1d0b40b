"""What a recipe made for many GPUs asks for, as a contract of one card."""
