"""`nextstate`, and `python -m nextstate`."""

import sys

_INTERRUPTED = 130


def main() -> int:
    """Runs a command; returns its exit code."""
    try:
        from nextstate.app.cli import main as run  # takes a second, in which Ctrl-C may come too

        return run()
    except KeyboardInterrupt:
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
