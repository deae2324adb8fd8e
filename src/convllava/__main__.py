"""`python -m convllava`, and the form in which torchrun starts several processes."""

from convllava.cli import main

main()
