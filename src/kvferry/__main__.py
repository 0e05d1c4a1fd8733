"""`python -m kvferry` is the command `kvferry`."""

import sys

from kvferry.cli import main

sys.exit(main())
