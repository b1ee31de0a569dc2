"""Training a stitched student on what its teacher computes, in slices that can be resumed."""
