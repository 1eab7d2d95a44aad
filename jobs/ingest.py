"""Pack image files into shards: raw/<name>@<version>.

As a Ray job: `python jobs/ingest.py RECIPE [key=value ...]`; see jobs/README.md.
"""

import sys

from heliostat.cli import main

if __name__ == "__main__":
    sys.exit(main(["ingest", *sys.argv[1:]]))
