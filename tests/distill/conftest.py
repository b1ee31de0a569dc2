"""Small example models and export tasks are shared with the tests of other rooms."""

import sys
from pathlib import Path

for room in ("models", "targets"):
    sys.path.insert(0, str(Path(__file__).parents[1] / room))
