"""Ray jobs, the command line, and everything that touches bytes."""
