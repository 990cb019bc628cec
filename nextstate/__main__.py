"""`python -m nextstate`."""

import sys

from nextstate.cli import main

sys.exit(main())
