"""Structured pruning: heads, feed-forward width, whole sublayers."""
