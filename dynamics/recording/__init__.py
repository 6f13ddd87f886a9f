"""Recording a training loop: attached to its optimizers, writing rows of its steps, events and epochs."""
