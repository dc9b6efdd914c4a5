"""A comparison of methods of clipping on a small language model."""
