"""`python -m plait.launch` is the `plait` command."""

from .cli import main

main()
