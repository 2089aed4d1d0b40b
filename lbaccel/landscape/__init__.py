"""The loss around trained weights: its surface, and how sharp it is."""
