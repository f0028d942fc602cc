"""The ground-truth reward of controlled sentiment."""
