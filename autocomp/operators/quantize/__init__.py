"""Weight quantisation."""
