"""`python -m modelwright` is the command line."""

from modelwright.cli import main

main()
