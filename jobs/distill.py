"""Train a smaller student of the model: model/<name>-student@<version>.

As a Ray job: `python jobs/distill.py RECIPE [key=value ...]`; see jobs/README.md.
"""

import sys

from heliostat.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
