"""`python -m lbaccel`: the same as `lbaccel`."""

import sys

from lbaccel.cli import main

sys.exit(main())
