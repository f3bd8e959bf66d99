"""Print the shell command that the README gives in the fenced block behind the marker ``<!-- command: NAME -->``."""

import re
import sys
from pathlib import Path


def readme_command(name: str, text: str) -> str:
    found = re.search(rf"<!-- command: {re.escape(name)} -->\s*```(?:sh|bash)\n(.*?)```", text, re.DOTALL)
    if found is None:
        raise SystemExit(f"README.md has no command block marked {name!r}")
    return found.group(1).strip()


if __name__ == "__main__":
    readme = Path(__file__).resolve().parents[1] / "README.md"
    print(readme_command(sys.argv[1], readme.read_text(encoding="utf-8")))
