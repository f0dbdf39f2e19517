"""`python -m tools.report`: see page.py."""

from data.program import run_program
from tools.report.page import main

run_program(main)
