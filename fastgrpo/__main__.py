"""`python -m fastgrpo` is the command `fastgrpo`."""

import sys

from fastgrpo.cli import main

sys.exit(main())
