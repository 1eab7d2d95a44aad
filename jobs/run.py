"""Run all stages of a recipe in order; finished ones are reused.

As a Ray job: `python jobs/run.py RECIPE [key=value ...]`; see jobs/README.md.
"""

import sys

from heliostat.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
