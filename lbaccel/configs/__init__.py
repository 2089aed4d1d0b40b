"""The launcher's files: those shipped, those made for a plan, and what accelerate reads in them."""
