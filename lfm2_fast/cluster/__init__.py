"""Ray Serve and Ray Data around the server: many replicas as one service, large batches."""
