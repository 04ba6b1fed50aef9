"""The device's side of play: compiled programs and the queue in front of them."""
