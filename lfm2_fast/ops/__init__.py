"""The fused operations: meaning, choice, Triton and native bodies, sampling."""
