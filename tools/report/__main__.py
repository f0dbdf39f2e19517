"""`python -m tools.report`: see page.py."""

import sys

from data.program import run_program
from tools.report.page import main

run_program(main, sys.argv[1:])
