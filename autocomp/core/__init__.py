"""The vocabulary every room speaks: quantities, units, options, candidates, errors. No torch."""
