"""Checkpoints: hub, safetensors, the fusion table and weight formats."""
