"""LFM2 itself, written in the fused operations."""
