"""OpenAI's uploads: a large file comes in parts, at most 64 MB each, and becomes a file when it is complete."""
