"""Proofs that take long: the service under change, churn, hostile files and kills. `make soak` runs them in full."""
