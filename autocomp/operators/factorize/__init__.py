"""Factorisation: a layer or table as the product of two thin ones."""
