"""Threshold rules, one a file."""
