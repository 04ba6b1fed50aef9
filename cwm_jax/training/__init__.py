"""One training step: examples, loss, gradients, and the update of the parameters."""
