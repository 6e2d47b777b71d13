"""Fused operations: their meaning, choice, Triton and native implementations; sampling."""
