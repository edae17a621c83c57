"""Short answers in plain words: each benchmark's own normalisation, none of it shared by accident.

Sources: GQA's eval.py with LLaVA's conversion (trailing full stops off, lower case); the VQA v2 answer normaliser as
TextVQA's evaluator applies it; POPE's and MME's scripts. Quirks of those scripts are kept, and named where they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

NUMBER_WORDS = {
    word: str(value)
    for value, words in enumerate(
        ("none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
    for word in words.split()
}
ARTICLES = frozenset(("a", "an", "the"))
# every form that lacks one apostrophe of these is mended; upper-case entries of the original table can never match
CONTRACTED = """\
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
STOP_NOT_BEFORE_DIGIT = re.compile(r"\.(?!\d)")
# the original passes a flag where `re.sub` takes a count, so it removes at most this many
MOST_STOPS = 32


def _contractions() -> dict[str, str]:
    table = {"somebody'd": "somebodyd"}  # the wrong way round in the original too
    for word in CONTRACTED.split():
        for place, letter in enumerate(word):
            if letter == "'":
                table[word[:place] + word[place + 1 :]] = word
    return table


CONTRACTIONS = _contractions()


def exact_match(prediction: str, answer: str) -> bool:
    """Equal after collapsing white space and case."""
    return " ".join(prediction.split()).casefold() == " ".join(answer.split()).casefold()


def gqa_match(prediction: str, answer: str) -> bool:
    """GQA: trailing full stops off the prediction, lower case, then equality. Articles and number words count."""
    return prediction.strip().rstrip(".").lower() == answer


def vqa_normalise(text: str) -> str:
    """The VQA v2 / EvalAI form of an answer, as TextVQA's evaluator computes it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    found = text
    for mark in VQA_PUNCTUATION:
        # next to a space anywhere in the answer: dropped everywhere; otherwise it becomes a space
        found = found.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    found = STOP_NOT_BEFORE_DIGIT.sub("", found, count=MOST_STOPS)
    words = (NUMBER_WORDS.get(word, word) for word in found.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy: min(1, matches / 3) averaged over leaving out one annotator at a time.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("no reference answers")
    said = vqa_normalise(prediction)
    equal = [vqa_normalise(answer) == said for answer in answers]
    matches = sum(equal)
    if not matches:
        return 0.0
    return sum(min(1.0, (matches - mine) / 3) for mine in equal) / len(answers)


def pope_label(text: str) -> str:
    """POPE: `no` if the first sentence has the word No, no or not (so written), else `yes`. Empty means yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme_label(text: str) -> str:
    """MME: yes or no if the first four characters contain it, else `other`, which is never right."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def words_of(text: str) -> list[str]:
    """Lower-case runs of letters and digits; one per character for scripts written without spaces."""
    return re.findall(r"[぀-ヿ㐀-鿿가-힯]|[^\W_]+", text.casefold())


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance between two sequences."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (left != right))
    return row[-1]


def word_error_rate(prediction: str, answer: str) -> float:
    """Word edits per word of the answer; 0 is perfect, above 1 is possible."""
    want, have = words_of(answer), words_of(prediction)
    return edit_distance(have, want) / len(want) if want else float(bool(have))


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity against the best answer (ST-VQA, DocVQA); 0 below the threshold."""
    best = 0.0
    said = " ".join(prediction.lower().split())
    for answer in answers:
        want = " ".join(answer.lower().split())
        longest = max(len(said), len(want))
        near = 1 - edit_distance(said, want) / longest if longest else 1.0
        best = max(best, near if near >= threshold else 0.0)
    return best


def rouge(prediction: str, answer: str) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L over `words_of`, without stemming."""
    have, want = words_of(prediction), words_of(answer)
    found = {f"rouge{n}": _overlap(_grams(have, n), _grams(want, n)) for n in (1, 2)}
    return {**found, "rougeL": _f1(_longest_common(have, want), len(have), len(want))}


def _grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _overlap(a: Counter[tuple[str, ...]], b: Counter[tuple[str, ...]]) -> float:
    return _f1((a & b).total(), a.total(), b.total())


def _f1(shared: int, have: int, want: int) -> float:
    return 2 * shared / (have + want) if shared else float(have == want == 0)


def _longest_common(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for left in a:
        corner = 0
        for j, right in enumerate(b, 1):
            corner, row[j] = row[j], corner + 1 if left == right else max(row[j], row[j - 1])
    return row[-1]
