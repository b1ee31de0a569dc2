"""Contract tests for extensions: subclass one in your own test suite, supply a fixture, run it."""
