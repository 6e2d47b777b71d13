"""Exports to other runtimes: the vendors' exporters, the proof of a file, and how it runs."""
