"""Serve ``python -m nni_jackpot.cli``."""

import sys

from nni_jackpot.cli import main

sys.exit(main())
