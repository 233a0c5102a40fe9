"""Figures over answers and wanted answers, both as text.

Exact match and F1 as SQuAD defines them (https://arxiv.org/abs/1606.05250, section 6.1), but for English articles
and punctuation, which stay: an answer of a tuned model is right when it says what the row says. BLEU by sacrebleu
(https://arxiv.org/abs/1804.08771), from 0 to 100; ROUGE by rouge-score, F-measure from 0 to 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tune.evaluation.libraries import TEXT_FIGURES, import_libraries


def text_figures(answers: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """All text metrics, each a mean over the answers except BLEU, which is over the whole set.

    Raises:
        InvalidRequestError: sacrebleu or rouge-score is not installed.
    """
    assert len(answers) == len(wanted) > 0, (len(answers), len(wanted))
    pairs = list(zip(answers, wanted, strict=True))
    figures = {
        "exact_match": sum(is_exact(answer, right) for answer, right in pairs) / len(pairs),
        "f1": sum(token_f1(answer, right) for answer, right in pairs) / len(pairs),
    }
    import_libraries(TEXT_FIGURES)
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    figures["bleu"] = float(sacrebleu.corpus_bleu(list(answers), [list(wanted)]).score)
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=False)
    scores = [scorer.score(right, answer) for answer, right in pairs]
    return figures | {name: sum(float(score[name].fmeasure) for score in scores) / len(scores) for name in names}


def is_exact(answer: str, wanted: str) -> bool:
    """Equal but for white space at the ends."""
    return answer.strip() == wanted.strip()


def token_f1(answer: str, wanted: str) -> float:
    """Harmonic mean of precision and recall over the words of both, lower case, each as often as it occurs."""
    given, right = Counter(answer.lower().split()), Counter(wanted.lower().split())
    if not given or not right:
        return float(given == right)
    shared = (given & right).total()
    if not shared:
        return 0.0
    precision, recall = shared / given.total(), shared / right.total()
    return 2 * precision * recall / (precision + recall)
