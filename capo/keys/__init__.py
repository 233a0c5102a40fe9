"""Keys: what one looks like, where its digest is stored, and what it may do."""
