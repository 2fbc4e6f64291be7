"""`python -m bridge` runs the command `bridge`."""

from bridge.cli import main

main()
