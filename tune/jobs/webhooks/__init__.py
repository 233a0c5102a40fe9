"""Webhooks as OpenAI sends them: an end of a job becomes a signed request to every endpoint that asked for it.

``outbox`` writes what is to be sent in the transaction that ends the job, so that neither is ever without the other;
``sender`` sends it from the control process, as often as it takes. A receiver may get a message twice, under one
``webhook-id``, and never misses one within three days.
"""
