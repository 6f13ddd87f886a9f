"""What a training loop does, seen from outside: its passes, batches, optimizers' settings, logged values, processes."""
