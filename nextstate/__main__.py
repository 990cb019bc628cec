"""`nextstate`, and `python -m nextstate`."""

import sys

_INTERRUPTED = 130


def main() -> int:
    """Runs a command; returns its exit code."""
    try:
        from nextstate.app.cli import main as run  # Ctrl-C may come during the import

        return run()
    except KeyboardInterrupt:
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
