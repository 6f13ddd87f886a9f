"""What a step did: its first-order quantities, and the curvature of the batches that it was of."""
