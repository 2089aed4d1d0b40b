"""Planning: what an update needs, known before it runs."""
