"""The page that plays a model in the browser alone: assembled from static files, and served."""
