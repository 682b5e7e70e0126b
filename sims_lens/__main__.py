"""``python -m sims_lens`` is ``sims-lens``."""

import sys

from sims_lens.cli import main

sys.exit(main())
