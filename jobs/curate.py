"""Retrieve, balance and pack: curated/<name>@<version>.

As a Ray job: `python jobs/curate.py RECIPE [key=value ...]`; see jobs/README.md.
"""

import sys

from heliostat.cli import main

if __name__ == "__main__":
    sys.exit(main(["curate", *sys.argv[1:]]))
