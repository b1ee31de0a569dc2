"""`python -m autocomp` is the `autocomp` command."""

from autocomp.cli.main import main

main()
