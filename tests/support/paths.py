"""Where things lie in the repository and in the environment that runs the tests."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RAYMASK = str(Path(sys.executable).with_name("raymask"))
