"""KV pages and conv states of every sequence, and the batch of one step."""
