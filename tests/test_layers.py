"""Does every layer import only from those below it?"""

import subprocess
import sys
from pathlib import Path


def test_the_layers_of_pyproject_are_kept() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([command, "--no-cache"], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout
