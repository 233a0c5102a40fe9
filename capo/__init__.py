"""Capo: the front door. CLI, settings, the composed application."""
