"""A checkpoint goes in, a checkpoint comes out."""
