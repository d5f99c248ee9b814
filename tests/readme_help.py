"""Put what `ldm` prints into README.md: `python tests/readme_help.py` rewrites what stands between its markers.

A marker `<!-- ldm samplers -->` begins a block whose text is what that command prints, `<!-- end -->` ends it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
_BLOCK = re.compile(r"<!-- ldm (?P<arguments>[^\n]*?) -->\n.*?<!-- end -->", re.DOTALL)


def with_help(text: str) -> str:
    """The README with every block as the commands print now."""
    return _BLOCK.sub(lambda match: _block(match["arguments"]), text)


def _block(arguments: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LDM_")}
    command = [sys.executable, "-m", "ldmcli", *arguments.split()]
    done = subprocess.run(command, env=kept | {"COLUMNS": "100"}, capture_output=True, text=True, check=True)
    return f"<!-- ldm {arguments} -->\n```\n$ ldm {arguments}\n{done.stdout.rstrip()}\n```\n<!-- end -->"


if __name__ == "__main__":
    README.write_text(with_help(README.read_text()))
