"""Copies, their components and evaluation images: copies/<name>@<version>.

As a Ray job: `python jobs/dedup.py RECIPE [key=value ...]`; see jobs/README.md.
"""

import sys

from heliostat.cli import main

if __name__ == "__main__":
    sys.exit(main(["dedup", *sys.argv[1:]]))
