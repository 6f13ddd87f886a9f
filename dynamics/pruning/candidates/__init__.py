"""What a pruning may remove: filters with what goes with each of them, or single weights."""
