"""The network: from arrays to raw outputs, independent of data and loss."""
