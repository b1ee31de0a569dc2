"""Sparsity: which weights of a linear layer become zero."""
