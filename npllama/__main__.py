"""`python -m npllama`."""

from __future__ import annotations

import sys

from npllama.cli import main

if __name__ == "__main__":
    sys.exit(main())
