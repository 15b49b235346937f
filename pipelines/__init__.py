"""Ray jobs, the command line, and everything that touches bytes."""

from pipelines.console import show_log

show_log()
