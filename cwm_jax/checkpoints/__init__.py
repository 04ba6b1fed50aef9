"""What a model is saved as and loaded from: runs, exports, bundles, PyTorch files."""
