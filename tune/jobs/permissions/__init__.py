"""OpenAI's permissions of checkpoints: a tenant lets other tenants use one of its fine-tuned models."""
