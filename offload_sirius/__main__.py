"""`python -m offload_sirius` is `offload-sirius`."""

from __future__ import annotations

import sys

from offload_sirius.cli import main

sys.exit(main())
