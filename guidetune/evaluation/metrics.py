"""Numbers computed from per-item results. Pure functions; each names its formula."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from math import comb, exp, log
from pathlib import Path
from typing import Any

import numpy as np

from guidetune.artefacts import derive_seed
from guidetune.errors import BadInput
from guidetune.evaluation.answers import normal_text


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased pass@k of n samples with c right: `1 - C(n-c, k) / C(n, k)` (arXiv 2107.03374)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1 - comb(n - c, k) / comb(n, k)


def majority(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> int | None:
    """Index of the first sample of the largest group of equivalent answers; ties go to the earliest group.

    Answers that could not be parsed (None) never vote; None when there is no vote at all.
    """
    votes = same_votes(answers, same)
    counts = Counter(vote for vote in votes if vote >= 0)
    most = max(counts.values(), default=0)
    return next((i for i, vote in enumerate(votes) if vote >= 0 and counts[vote] == most), None)


def same_votes(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> list[int]:
    """For each sample the number of its group of equivalent answers, -1 for one that cannot be parsed: it never votes."""
    first: list[str] = []
    votes = []
    for answer in answers:
        if answer is None:
            votes.append(-1)
            continue
        group = next((g for g, known in enumerate(first) if answer == known or same(known, answer)), len(first))
        if group == len(first):
            first.append(answer)
        votes.append(group)
    return votes


EXACT_SUBSETS, DRAWN_SUBSETS = 2000, 400


def majority_at_k(votes: Sequence[Sequence[int]], correct: Sequence[Sequence[float]], k: int, seed: int = 0) -> list[float]:
    """maj@k of each item: the mean over subsets of k of its n samples of `correct` of the subset's majority vote.

    In a subset the largest group of equal votes wins; ties go to the group of its earliest sample; a subset without a vote scores 0. All
    C(n, k) subsets are taken up to 2000, else 400 that are drawn from the seed. votes (of `same_votes`), correct: [items, n].
    """
    n = len(votes[0])
    if comb(n, k) <= EXACT_SUBSETS:
        subsets = np.array(list(combinations(range(n), k)))
    else:
        rng = np.random.default_rng(derive_seed(seed, "maj@k", n, k))
        subsets = np.sort(np.argsort(rng.random((DRAWN_SUBSETS, n)), axis=1)[:, :k], axis=1)
    labels, values = np.asarray(votes), np.asarray(correct, dtype=np.float64)
    total = np.zeros(len(labels))
    for subset in np.array_split(subsets, max(1, len(labels) * len(subsets) * k * k // 20_000_000 + 1)):  # bounds the memory
        chosen = labels[:, subset]  # [items, subsets, k]
        size = (chosen[..., :, None] == chosen[..., None, :]).sum(-1)
        size[chosen < 0] = 0
        winner = size.argmax(-1)  # the first of the largest
        voted = np.take_along_axis(size, winner[..., None], -1)[..., 0] > 0
        right = np.take_along_axis(values[:, subset], winner[..., None], -1)[..., 0]
        total += np.where(voted, right, 0.0).sum(-1)
    return [float(value) for value in total / len(subsets)]


def calibration_error(confidence: Sequence[float], correct: Sequence[float], bins: int = 10) -> float:
    """Expected calibration error over `bins` equal bins (lo, hi]: `sum_b n_b/N |acc_b - conf_b|`."""
    conf, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if conf.size == 0:
        return float("nan")
    place = np.clip(np.searchsorted(np.linspace(0, 1, bins + 1), conf, side="left") - 1, 0, bins - 1)
    total = sum(abs(right[place == b].sum() - conf[place == b].sum()) for b in range(bins))
    return float(total / conf.size)


def choice_scores(loglik: Sequence[float], choices: Sequence[str], prior: Sequence[float] | None = None) -> dict[str, int]:
    """The index chosen by log-likelihood (`acc`), per character (`acc_norm`) and per UTF-8 byte (`acc_bytes`); ties go to the first.

    With `prior`, the log-likelihoods without the question, also by `ll(c | question) - ll(c)` (`acc_mutual_info`).
    """

    def best(values: Sequence[float]) -> int:
        return max(range(len(values)), key=lambda i: (values[i], -i))

    found = {
        "acc": best(loglik),
        "acc_norm": best([ll / max(1, len(c)) for ll, c in zip(loglik, choices, strict=True)]),
        "acc_bytes": best([ll / max(1, len(c.encode())) for ll, c in zip(loglik, choices, strict=True)]),
    }
    if prior is not None:
        found["acc_mutual_info"] = best([ll - alone for ll, alone in zip(loglik, prior, strict=True)])
    return found


def softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    powers = [exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def truthful_mass(loglik: Sequence[float], true: Sequence[bool]) -> float:
    """TruthfulQA MC2 (arXiv 2109.07958): share of probability on true answers, `p = exp(ll)`, no length norm."""
    shares = softmax(loglik)
    right, wrong = (sum(p for p, t in zip(shares, true, strict=True) if bool(t) is kind) for kind in (True, False))
    return right / (right + wrong)


def perplexity(nll: float, tokens: int) -> float:
    """`exp(nll / tokens)`, nll in nats; infinite when it overflows."""
    try:
        return exp(nll / tokens)
    except OverflowError:
        return float("inf")


def bits_per_byte(nll: float, size: int) -> float:
    """`nll / (bytes ln 2)`: comparable between tokenizers."""
    return nll / (size * log(2))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the prediction equals a reference in lower case, without punctuation; articles are kept (Super-NaturalInstructions)."""
    return float(any(normal_text(prediction) == normal_text(reference) for reference in references))


def rouge_l(prediction: str, references: Sequence[str], tokenize: Callable[[str], list[str]] | None = None) -> float:
    """ROUGE-L F1 with stemming, the largest over the references.

    The default tokenizer keeps only a-z and 0-9: give `tokenize` (`byte_level_tokens`, say) for other scripts.
    """
    scorer = _rouge(tokenize)
    return float(max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in references))


@cache
def _rouge(tokenize: Callable[[str], list[str]] | None) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    class Tokenizer:
        def tokenize(self, text: str) -> list[str]:
            assert tokenize is not None
            return tokenize(text)

    return RougeScorer(["rougeL"], use_stemmer=True, tokenizer=Tokenizer() if tokenize else None)


@cache
def byte_level_tokens(path: str | None = None) -> Callable[[str], list[str]]:
    """Tokens of any script by a byte-level BPE: that of a tokenizer.json, or the embedded world's, which every model is measured with.

    Raises:
        BadInput: the file is no tokenizer.
    """
    from tokenizers import Tokenizer

    from guidetune.world.export import WEIGHTS

    file = Path(path) if path is not None else WEIGHTS / "instruct" / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise BadInput(f"{file} is not a tokenizer.json: {error}") from None
    return lambda text: tokenizer.encode(text.strip(), add_special_tokens=False).tokens


def squad_words(text: str) -> list[str]:
    """The words of SQuAD's normalisation: lower case, no ASCII punctuation, no a, an, the (unless nothing else is there: "The The")."""
    return normal_text(text, articles=False).split() or normal_text(text).split()


def squad_exact(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the prediction equals a reference after SQuAD's normalisation."""
    return float(any(squad_words(prediction) == squad_words(reference) for reference in references))


def squad_f1(prediction: str, references: Sequence[str]) -> float:
    """`2 |shared| / (|prediction| + |reference|)` over multisets of SQuAD's words, the largest over the references."""

    def f1(reference: str) -> float:
        a, b = squad_words(prediction), squad_words(reference)
        if not a or not b:
            return float(a == b)
        return 2 * sum((Counter(a) & Counter(b)).values()) / (len(a) + len(b))

    return max(f1(reference) for reference in references)


def translation(hypotheses: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> dict[str, Any]:
    """Corpus BLEU (exponential smoothing), chrF2, chrF++ and TER with their sacrebleu signatures; zh, ja and ko need their `tokenize`."""
    from sacrebleu.metrics import BLEU, CHRF, TER

    scorers = {"bleu": BLEU(tokenize=tokenize), "chrf": CHRF(), "chrf++": CHRF(word_order=2), "ter": TER()}
    scores = {name: scorer.corpus_score(list(hypotheses), [list(references)]).score for name, scorer in scorers.items()}
    return {**scores, "signatures": {name: str(scorer.get_signature()) for name, scorer in scorers.items()}}


def sentence_chrf(hypothesis: str, reference: str) -> float:
    """chrF++ (characters to 6, words to 2, beta 2) of one sentence by sacrebleu, from 0 to 1."""
    return float(_chrf().sentence_score(hypothesis, [reference]).score) / 100


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF(word_order=2)


def forgetting(scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Continual-learning summary of R[i][j], the score on task j after stage i (T x T, entries above the diagonal are ignored).

    `average = mean_j R[T,j]`; `backward_transfer = mean_{j<T} (R[T,j] - R[j,j])`;
    `forgetting = mean_{j<T} (max_{j<=i<T} R[i,j] - R[T,j])`.
    """
    last = len(scores) - 1
    old = range(last)
    return {
        "average": float(np.mean([scores[last][j] for j in range(last + 1)])),
        "backward_transfer": float(np.mean([scores[last][j] - scores[j][j] for j in old])) if last else 0.0,
        "forgetting": float(np.mean([max(scores[i][j] for i in range(j, last)) - scores[last][j] for j in old])) if last else 0.0,
    }
