"""Hashes, detectors and embeddings of every image: features/<name>@<version>.

As a Ray job: `python jobs/embed.py RECIPE [key=value ...]`; see jobs/README.md.
"""

import sys

from heliostat.cli import main

if __name__ == "__main__":
    sys.exit(main(["embed", *sys.argv[1:]]))
