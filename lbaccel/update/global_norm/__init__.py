"""BatchNorm over the whole global batch, in passes that end at its layers."""
