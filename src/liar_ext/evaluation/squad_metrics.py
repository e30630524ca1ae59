"""Exact match and F1 of SQuAD, as its official scripts define them.

An answer is compared in normal form: lower case, without punctuation (ASCII's) and the words a, an
and the, white space made single. Exact match is 1 where the forms are the same; F1 is that of the
two bags of words. Of several reference answers the best counts. Version 2 has questions without an
answer: the reference is then the empty answer, references whose normal form is empty do not count,
and F1 with an empty side is 1 where both are.

Source: Rajpurkar et al., arXiv 1606.05250 and 1806.03822; `evaluate-v1.1.py`, `evaluate-v2.0.py`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normal_form(answer: str) -> str:
    """What answers are compared as."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def scores(answer: str, references: Sequence[str], version: int) -> tuple[bool, float]:
    """Exact match and F1 of one answer.

    Args:
        references: none for a question of version 2 that has no answer.
        version: 1 or 2.
    """
    wanted = list(references)
    if version == 2:
        wanted = [one for one in wanted if normal_form(one)] or [""]
    form = normal_form(answer)
    exact = any(form == normal_form(one) for one in wanted)
    return exact, max(_f1(form, normal_form(one), version) for one in wanted)


def _f1(answer: str, reference: str, version: int) -> float:
    given, wanted = answer.split(), reference.split()
    if version == 2 and not (given and wanted):
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    # the harmonic mean of common / given and common / wanted
    return 2 * common / (len(given) + len(wanted)) if common else 0.0
