"""Recording a training loop: attached to its optimizers, measuring around its steps and events, writing rows."""
