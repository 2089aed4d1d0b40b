"""One file a subcommand of `lbaccel`."""
