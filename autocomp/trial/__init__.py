"""What happens to one candidate: screened while stitched, or distilled, exported and measured."""
