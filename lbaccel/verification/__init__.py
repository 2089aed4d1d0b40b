"""`lbaccel verify`: a gradient check for large-batch training, on the user's own model."""
