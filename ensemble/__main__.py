"""`python -m ensemble`."""

from ensemble.cli import main

main()
