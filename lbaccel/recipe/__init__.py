"""What `lbaccel train` is asked for, and what it builds from that."""
