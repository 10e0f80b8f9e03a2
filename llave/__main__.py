import sys

from llave.cli import main

sys.exit(main())
