"""`python -m flexq` is the command `flexq`."""

import sys

from flexq.cli import main

sys.exit(main())
