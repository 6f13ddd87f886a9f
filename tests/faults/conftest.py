"""Processes are killed and limited as POSIX has it."""

import sys

collect_ignore_glob = ["*"] if sys.platform == "win32" else []
