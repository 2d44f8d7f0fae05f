"""`python -m mmgpt`: the same as the console script."""

import sys

from mmgpt.cli import main

sys.exit(main())
