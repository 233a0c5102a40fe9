"""From a recipe and data files to a published artifact.

Reading order: ``recipe`` (what to do) -> ``data/`` (rows, masks, packs, batches) -> ``model`` -> ``train``
-> ``export`` -> ``session`` (the whole flow). ``progress`` holds what a run tells its watchers.
``recipe``, ``progress`` and ``data.rows`` import neither torch nor transformers, because the HTTP process
uses them. This room knows ``registry`` and never ``serve``.
"""
