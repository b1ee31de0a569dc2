"""Token reduction: shorter sequences behind an attention sublayer. No weight changes."""
