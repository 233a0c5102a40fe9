"""Other forms of what was tuned: merged weights, GPTQ weights, an extracted adapter; each verified before it is there.

Reading order: ``settings`` (what a recipe may ask) -> ``merge``, ``gptq``, ``lora`` (how the bytes are made) ->
``verification`` (how far they are from the original) -> ``session`` (what is exported, and the whole flow).
``settings`` imports neither torch nor transformers.
"""
