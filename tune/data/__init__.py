"""The data path: file -> checked rows -> token ids + loss mask on disk -> plan of steps.

    containers, json_array, arrow    what rows come in; JSONL's own reader is ``rows``
    rows, messages, formats, preferences, datafile    rows of every format, checked, each fault with its line
    clean, duplicates, personal      what a recipe may ask to be done to rows
    mask, pairs, encode              rows to token ids and loss masks, with a tokenizer
    store, dataset, examples         tokenised rows on disk, accounted for, and picked by number
    packing, batches                 which examples meet in which step; numbers only
    examine, account, report, show   ``capo data``

``rows`` and ``messages`` import neither numpy nor a tokenizer: the files API uses them.
"""
