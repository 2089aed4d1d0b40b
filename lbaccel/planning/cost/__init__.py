"""The bytes and seconds that an update takes on a device."""
