"""OpenAI-compatible HTTP service around an engine."""
