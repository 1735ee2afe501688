"""The `lowbit` command; see `lowbit --help`."""

import sys


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    from .bench.cli import run

    return run(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
