"""What the parts cost, beside what others do; each module is a command, `python -m benchmarks.NAME --help`."""
