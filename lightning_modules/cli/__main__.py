"""`python -m lightning_modules.cli` is `imbsam`, without its quick answers."""

from lightning_modules.cli.run import main

main()
