"""The quality report: what the stored images look like, and the checks they must pass."""
