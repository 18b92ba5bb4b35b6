"""`python -m ttt_e2e` is the command `ttt-e2e`."""

import sys

from ttt_e2e.cli import main

sys.exit(main())
