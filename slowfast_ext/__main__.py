"""``python -m slowfast_ext``: the command line without its entry point on the path."""

import sys

from .cli import main

sys.exit(main())
