"""A comparison of methods of clipping on small tasks."""
