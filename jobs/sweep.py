"""Try settings side by side: sweep/<name>@<version>.

As a Ray job: `python jobs/sweep.py RECIPE [key=value ...]`; see jobs/README.md.
"""

import sys

from heliostat.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
