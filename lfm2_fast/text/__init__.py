"""Conversations and presets; token ids to text, thinking and tool calls."""
