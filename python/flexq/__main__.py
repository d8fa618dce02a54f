"""`python -m flexq` is the command `flexq`."""

import sys

from flexq.cli.main import main

sys.exit(main())
