import sys

from spimpi.cli import main

sys.exit(main())
