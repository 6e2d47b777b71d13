"""Command line: one command a file, and their shared code."""
