"""One readable file a family, and what it takes to find, check and load a checkpoint."""
