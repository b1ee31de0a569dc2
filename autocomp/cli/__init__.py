"""The command line: parses, calls `autocomp.api`, prints. No logic of its own."""
