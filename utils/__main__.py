"""`python -m utils`: see `utils.cli`."""

import sys

from utils.cli import main

if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a character that the console lacks must not stop it
        stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
