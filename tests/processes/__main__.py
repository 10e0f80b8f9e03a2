import sys

from tests.processes import main

main(*sys.argv[1:])
