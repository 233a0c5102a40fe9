"""What a tuned model is worth: figures of base and tuned model on held-out rows, a report, and the promotion gate.

Reading order: ``settings`` (what a recipe may ask) -> ``questions`` -> ``scoring`` and ``answers`` (what a model does)
-> ``figures`` -> ``comparison`` (base against tuned) -> ``report`` -> ``promotion``. ``benchmarks`` runs lm-eval.
``settings`` and ``promotion`` import neither torch nor transformers.
"""
