"""`python -m finemill` is the `finemill` command."""

import sys

from finemill.cli import main

sys.exit(main())
