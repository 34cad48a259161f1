"""`python -m llava_prune`."""

from .cli import main

main()
