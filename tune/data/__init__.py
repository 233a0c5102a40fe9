"""The data path: file -> checked rows -> token ids + loss mask -> packs -> batches.

``rows`` knows files and JSON only; ``mask`` knows tokenizers; ``packing`` and ``batches`` know numbers only.
"""
