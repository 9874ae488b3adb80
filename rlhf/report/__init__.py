"""A run, a sweep or a pipeline as one HTML page. Reads folders only; needs no network and no script."""
