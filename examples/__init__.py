"""Examples: the embedded base model's making, and adapter tasks with their data. Not part of the package."""
