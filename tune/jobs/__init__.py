"""Fine-tuning jobs: files, queue and workers behind OpenAI's files and fine-tuning API.

The way of a job: ``routes`` (HTTP) -> ``service`` (checks) -> ``store`` (the row) -> ``worker`` (claims it
and forks) -> ``training`` (in the child: recipe, run, publish) -> ``queue`` (the end). ``records`` holds the
nouns, ``wire`` shows them as OpenAI does. Beside the jobs: ``uploads`` (files in parts), ``permissions`` (of
fine-tuned models) and ``webhooks`` (of jobs' ends); ``api`` puts all of it together. Nothing here imports torch or
transformers, except the worker process.
"""
