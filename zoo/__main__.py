"""The program `zoo`, also as `python -m zoo`."""

import sys


def main() -> None:
    """Run the command; an interruption before it can answer for itself, as during its imports, ends it silently."""
    try:
        from zoo.cli import run

        sys.exit(run())
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
