"""Serve ``python -m nni_jackpot``."""

import sys

from nni_jackpot.cli import main

sys.exit(main())
