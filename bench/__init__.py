"""Benchmarks; ``make bench`` runs both. ``python -m bench serving`` compares serving with bare vLLM, and
``python -m bench training`` training with TRL, each on the same machine and settings.
"""
