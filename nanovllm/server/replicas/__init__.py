"""Several engines of one model behind Ray Serve; see docs/parallelism.md."""
