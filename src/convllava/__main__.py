"""Run the command line with `python -m convllava`; torchrun starts several processes this way."""

from convllava.cli import main

main()
