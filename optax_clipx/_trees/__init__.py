"""Pytrees: their leaves and paths, arithmetic at the ends of the range, arguments.

In: pytrees, arrays and arguments as a user passes them.
Out: flat leaves with their paths, sums and quotients that stay finite, clear errors.
May import: JAX and NumPy only; nothing else of this package.
"""
