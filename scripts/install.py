"""Make a virtual environment with handmill in it, or find it made already.

    install.py [--venv FOLDER] [--extra NAME] [REQUIREMENT...]

Runs on the system's Python, of whatever age: this file must at least parse there, to be able to say so.
"""

import os
import sys


def start() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036
        version = ".".join(map(str, sys.version_info[:2]))
        print(
            f"handmill: Python 3.11 or newer is needed, and {sys.executable} is {version}. Install one:\n"
            "  Debian, Ubuntu   sudo apt install python3.12 python3.12-venv\n"
            "  Fedora           sudo dnf install python3.12\n"
            "  macOS            brew install python@3.12",
            file=sys.stderr,
        )
        return 1
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120
    from scripts.environment import main

    return main()


if __name__ == "__main__":
    sys.exit(start())
