"""One training step: examples, loss, gradients, and the parameter update."""
