"""What a training loop does, seen from outside: passes, batches, optimizer settings, logged values, processes."""
