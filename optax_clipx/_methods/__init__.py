"""The named methods, each a composition of measure, threshold and response."""
