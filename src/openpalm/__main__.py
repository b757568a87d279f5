import sys

from openpalm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
