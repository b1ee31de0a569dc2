"""Compression operators, one file per method, and the product of their steps at a unit."""
