"""autocomp: state a hardware budget, get a compressed transformer back."""

__version__ = "0.1.0"
