"""Trials of rules for `auto_clip` on small tasks, other than those of clipbench."""
