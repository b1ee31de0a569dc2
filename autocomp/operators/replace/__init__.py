"""Replacing attention by mixers, trained to do what attention did."""
