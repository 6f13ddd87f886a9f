"""What a pruning may remove: filters with all that belongs to them, or single weights."""
