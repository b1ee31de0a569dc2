"""The library: every option of every unit built once, stored by content, stitched into models."""
