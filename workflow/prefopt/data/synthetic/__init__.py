"""The worlds of the embedded default."""
