"""The page that runs a model in the browser without a server: building and serving it."""
