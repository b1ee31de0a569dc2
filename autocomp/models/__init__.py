"""Models: where they come from, what their units are, and surgery on them."""
