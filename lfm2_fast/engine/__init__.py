"""Prefill and decode steps on fixed buffers, and the graphs captured of them."""
