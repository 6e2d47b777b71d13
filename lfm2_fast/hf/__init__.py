"""Hugging Face's API: load, the class, forward, generate and its arguments."""
