"""HTTP: requests, tokens, and the public and internal routes."""
