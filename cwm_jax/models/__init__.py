"""The network: arrays in, raw outputs out; nothing here knows of data or of a loss."""
