"""What an update takes in bytes and seconds on a device."""
