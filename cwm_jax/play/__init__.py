"""Playing inside the model: sessions, the device they share, and the page in the browser."""
