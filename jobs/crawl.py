"""Pages, WARC files or lists of URLs: raw/<name>@<version>.

As a Ray job: `python jobs/crawl.py RECIPE [key=value ...]`; see jobs/README.md.
"""

import sys

from heliostat.cli import main

if __name__ == "__main__":
    sys.exit(main(["crawl", *sys.argv[1:]]))
