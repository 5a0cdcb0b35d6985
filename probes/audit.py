"""What in a behaviour's data could give a side away without the behaviour: lengths, words, repetitions, missing parts.

A direction is extracted from the difference between two kinds of prompts, so anything else that differs between them is
in it too. Two give-aways are cheap to find and cheap to avoid: length, and which words occur at all. The audit puts a
limit on both for the prompts and on length for the answers, and reports what has no limit of its own.

Words: logistic regression on word counts, fitted on matched pairs: on the difference between the two prompts of an item
and its negative, without an offset, so what both sides share cancels. It is scored on topics and, where there is more
than one persona pair, on pairs that it was not fitted on: of T folds of topics and P folds of pairs, each cell is
scored by a fit on what shares neither (where nothing is left to fit on, on what does not share the topics). The AUROC
is taken within cells and averaged by items. Its chance level is the same procedure with sides swapped at random: for
all items of a persona pair together, since their prompts repeat the same two turns; with fewer than 6 pairs, whose
swaps are too few to tell anything, for single items; for answers, for all items of a topic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from sklearn import config_context
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from probes import stats
from probes.behaviors import Behavior, Item, Side
from probes.criteria import GateCriteria
from probes.errors import SEEDS, WrongInput
from probes.stats import Estimate, derived_seed

LENGTH_LIMIT = 0.2  # |AUROC - 0.5| of word counts
WORDS_LIMIT = 0.6  # AUROC of a bag of words, where it also exceeds chance
NEAR = 0.95  # cosine of TF-IDF vectors
NEAR_LIMIT = 0.05  # share of items
FOLDS = 5
SWAPS = 39  # the second largest AUROC of chance is then its 95th percentile
MIN_PAIRS = 6  # swaps of 5 persona pairs give no p-value below 1/16
_SIDES: tuple[Side, Side] = ("wanted", "unwanted")
_WORD = r"\b\w+\b"  # single letters too
Status = Literal["pass", "fail", "reported"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One row of an audit. `value` is None where there is nothing to measure; `note` then says why.

    `lower` and `upper` are a 95 % interval over topic groups unless `note` says otherwise: the least and the greatest
    count of a group, or the range of chance, which 5 in 100 exceed on either side.
    """

    name: str
    value: float | None
    lower: float | None = None
    upper: float | None = None
    limit: str = ""
    status: Status = "reported"
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.status}, {_said(self.value)} (allowed: {self.limit or 'anything'})"


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What was found in one behaviour's data."""

    behavior: str
    hash: str
    checks: tuple[Check, ...]
    seed: int

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == "fail")

    def __getitem__(self, name: str) -> Check:
        found = next((check for check in self.checks if check.name == name), None)
        if found is None:
            raise WrongInput(f"no check '{name}'; there are {', '.join(check.name for check in self.checks)}")
        return found

    def frame(self) -> pd.DataFrame:
        """One row for each check: name, value, lower, upper, limit, status, note."""
        return pd.DataFrame([vars(check) for check in self.checks]).astype(
            {"value": float, "lower": float, "upper": float}
        )

    def table(self) -> str:
        """The checks as text, one a line."""
        shown = ((c.name, _said(c.value), _between(c), c.limit, c.status, c.note) for c in self.checks)
        rows = [("check", "value", "interval", "allowed", "status", ""), *shown]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join([*map(str.ljust, row[:5], widths), row[5]]).rstrip() for row in rows]
        return "\n".join(lines)

    def __str__(self) -> str:
        limited = sum(check.status != "reported" for check in self.checks)
        said = "; ".join(map(str, self.failures)) or f"{limited} checks with a limit"
        return f"audit of {self.behavior} {'passed' if self.passed else 'FAILED'}: {said}"


def audit(behavior: Behavior, *, seed: int = 0) -> Audit:
    """Check a behaviour's data; a second or two for a few hundred items.

    Items out of distribution are counted and compared with the others for duplicates, and not looked at otherwise.

    Raises:
        WrongInput: a seed that is out of range.
    """
    if not SEEDS[0] <= seed <= SEEDS[1]:
        raise WrongInput(f"seed must lie between {SEEDS[0]} and {SEEDS[1]}, saw {seed}")
    checks = (
        *_counts(behavior),
        *_duplicates(behavior),
        *_personas(behavior),
        *_lengths(behavior, seed),
        *_words(behavior, seed),
        _scorer(behavior, seed),
    )
    return Audit(behavior=behavior.name, hash=behavior.hash, checks=checks, seed=seed)


def length_auroc(behavior: Behavior, *, seed: int = 0) -> tuple[Estimate, Estimate]:
    """How well the number of words tells wanted from unwanted: AUROC of (prompts, answers); 0.5 is not at all.

    Above 0.5 the wanted side is longer: of two that are drawn from all items, or of the two of one item, whichever
    tells more (a few words more on every item are much within pairs, and little in all). The prompts of an item differ
    in the persona alone, so its words are counted; without personas the prompts are the same and the AUROC is 0.5.
    Intervals over topic groups.
    """
    groups = [item.group for item in behavior.items]

    def found(text: Callable[[Item, Side], str]) -> Estimate:
        one, other = ([len(text(item, side).split()) for item in behavior.items] for side in _SIDES)
        within = [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(one, other, strict=True)]
        among = stats.auroc(one, other, groups, seed=seed)
        return max(among, stats.mean(within, groups, seed=seed), key=lambda area: abs(area.value - 0.5))

    return found(_persona), found(_answer)


def _counts(behavior: Behavior) -> list[Check]:
    sizes = Counter(item.group for item in behavior.items).values()
    shared = {item.group for item in behavior.ood} & set(behavior.groups)
    return [
        Check(name="items", value=len(behavior.items)),
        Check(name="groups", value=len(behavior.groups)),
        Check(
            name="items per group", value=len(behavior.items) / len(sizes), lower=min(sizes), upper=max(sizes),
            note="interval: least and greatest",
        ),
        _held_out(behavior),
        Check(name="forms", value=len(behavior.forms), note=", ".join(behavior.forms)),
        Check(name="items out of distribution", value=len(behavior.ood)),
        Check(name="topics shared with them", value=len(shared), note=", ".join(sorted(shared))),
    ]  # fmt: skip


def _held_out(behavior: Behavior) -> Check:
    """Is that enough to judge on? By the gate's own split and rules."""
    rules, groups = GateCriteria(), len(behavior.groups)
    held = behavior.split()[1] if groups > 1 else None
    prompts, topics = (len(held.items), len(held.groups)) if held else (0, 0)
    enough = prompts >= rules.min_prompts and topics >= rules.min_groups
    need = f"a verdict needs {rules.min_prompts} in {rules.min_groups} groups"
    return Check(
        name="held-out prompts", value=prompts, note=f"in {topics} groups; {need}{'' if enough else ': INCONCLUSIVE'}"
    )


def _duplicates(behavior: Behavior) -> list[Check]:
    items = (*behavior.items, *behavior.ood)
    whole = [(_asked(i), _persona(i, "wanted"), _persona(i, "unwanted"), i.wanted, i.unwanted) for i in items]
    asked = [_asked(item) for item in items]
    answered = len(set(asked)) == 1
    texts = [f"{item.wanted} {item.unwanted}" for item in items] if answered else asked
    near = _near(sorted(set(texts))) / len(items)
    exact, again = (1 - len(set(seen)) / len(items) for seen in (whole, asked))
    return [
        Check(name="exact duplicates", value=exact, limit="0", status=_status(exact == 0), note="share of items"),
        Check(name="repeated prompts", value=again, note="share of items, with other personas or answers"),
        Check(
            name="near duplicates", value=near, limit=f"<= {NEAR_LIMIT:g}", status=_status(near <= NEAR_LIMIT),
            note=f"share of items whose {'answers' if answered else 'prompt'} is like another's (cosine > {NEAR:g})",
        ),
    ]  # fmt: skip


def _near(texts: Sequence[str]) -> int:
    """How many of these different texts are nearly one that stands before them."""
    vectors: Any = TfidfVectorizer(token_pattern=_WORD + r"|[^\w\s]").fit_transform(texts)  # signs too: "?" is a text
    alike = sparse.triu(vectors @ vectors.T > NEAR, k=1)
    return int((alike.sum(0) > 0).sum())


def _personas(behavior: Behavior) -> list[Check]:
    bare = sum(not item.persona for item in behavior.items) / len(behavior.items)
    note = "without personas the prompts of both sides are the same" if bare else ""
    status: Status = "reported" if bare == 1 else _status(bare == 0)
    return [
        Check(name="items without personas", value=bare, limit="0 or 1", status=status, note=note),
        Check(name="persona pairs", value=len({_pair(item) for item in behavior.items if item.persona})),
    ]


def _lengths(behavior: Behavior, seed: int) -> list[Check]:
    prompts, answers = length_auroc(behavior, seed=seed)
    low, high = 0.5 - LENGTH_LIMIT, 0.5 + LENGTH_LIMIT
    return [
        Check(
            name=name, value=found.value, lower=found.lower, upper=found.upper, limit=f"{low:g} to {high:g}",
            status=_status(abs(found.value - 0.5) <= LENGTH_LIMIT + 1e-9) if differ else "reported",
            note="AUROC of word counts" if differ else "no personas, the prompts are the same",
        )
        for name, found, differ in (
            ("length of prompts", prompts, any(item.persona for item in behavior.items)),
            ("length of answers", answers, True),
        )
    ]  # fmt: skip


def _words(behavior: Behavior, seed: int) -> list[Check]:
    """What a bag of words finds in prompts and answers. Only single words in prompts have a limit.

    Personas of the same words in another order must differ in pairs of words, and answers differ by what they are for.
    """
    items = behavior.items
    groups = [item.group for item in items]
    pairs = [_pair(item) for item in items]
    by_pair = len(set(pairs)) >= MIN_PAIRS
    swapped = pairs if by_pair else [item.id for item in items]
    chance = f"AUROC; interval: chance, {SWAPS} swaps of"
    rows: list[Check] = []
    for name, text, held, together, words, swaps, note in (
        ("words of prompts", _prompt, pairs, swapped, 1, SWAPS, f"{chance} {'persona pairs' if by_pair else 'items'}"),
        ("word pairs of prompts", _prompt, pairs, swapped, 2, 0, "AUROC"),
        ("words of answers", _answer, None, groups, 1, SWAPS, f"{chance} topics"),
    ):
        if text is _prompt and not any(item.persona for item in items):
            rows.append(Check(name=name, value=None, note="no personas, the prompts are the same"))
        elif len(set(groups)) < 2:
            rows.append(Check(name=name, value=None, note="needs 2 topic groups, one to fit on and one to score"))
        else:
            sides = [[text(item, side) for item in items] for side in _SIDES]
            draws = _separability(
                sides, groups, held, together, words=words, swaps=swaps, seed=derived_seed(seed, name)
            )
            rows.append(_chance(name, draws, note, limited=name == "words of prompts"))
    return rows


def _chance(name: str, draws: NDArray[np.float64], note: str, *, limited: bool) -> Check:
    """A row from an AUROC and those of swapped sides [1 + swap]."""
    value, swapped = float(draws[0]), draws[1:]
    if not len(swapped):
        return Check(name=name, value=value, note=note)
    lower, upper = -stats.null_bar(-swapped, confidence=0.95), stats.null_bar(swapped, confidence=0.95)
    allowed = max(WORDS_LIMIT, upper)
    status = _status(value <= allowed + 1e-9) if limited else "reported"
    limit = f"<= {allowed:.3g}" if limited else ""
    return Check(name=name, value=value, lower=lower, upper=upper, limit=limit, status=status, note=note)


def _separability(
    sides: Sequence[Sequence[str]], groups: Sequence[str], pairs: Sequence[Hashable] | None,
    together: Sequence[Hashable], *, words: int, swaps: int, seed: int,
) -> NDArray[np.float64]:  # fmt: skip
    """AUROC of a bag of words [1 + swap], the first with the real sides.

    Args:
        sides: texts of (wanted, unwanted).
        pairs: of what the classifier must not have seen either, besides the topic.
        together: items with the same name here are swapped together.
        words: how many words in a row are counted as one.
        swaps: how often sides are swapped at random.
    """
    counts = CountVectorizer(ngram_range=(words, words), token_pattern=_WORD)
    try:
        counts.fit([text for side in sides for text in side])
    except ValueError:  # no words at all, so nothing to tell sides apart by
        return np.full(1 + swaps, 0.5)
    both = [sparse.csr_matrix(counts.transform(side), dtype=np.float64) for side in sides]
    used = np.unique((both[0] - both[1]).nonzero()[1])  # a word that all items have equally often on both sides is none
    if not len(used):
        return np.full(1 + swaps, 0.5)
    wanted, unwanted = (side[:, used] for side in both)
    fold = _folds(groups, seed)
    other = np.zeros_like(fold) if pairs is None else _folds(pairs, seed)
    index = np.unique([str(name) for name in together], return_inverse=True)[1]
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (1 + swaps, int(index.max()) + 1))
    signs[0] = 1
    signs, total = signs[:, index], np.zeros(1 + swaps)
    for i, j in sorted(set(zip(fold.tolist(), other.tolist(), strict=True))):
        held = (fold == i) & (other == j)
        train = (fold != i) & ((other != j) | (other.max() == 0))
        if not train.any():
            train = fold != i
        weights = _weights((wanted - unwanted)[train], signs[:, train])
        both_scores = ((side[held] @ weights.T).T for side in (wanted, unwanted))  # [swap, item]
        for k, scores in enumerate(zip(*both_scores, strict=True)):
            high, low = (np.where(signs[k, held] > 0, *pair) for pair in (scores, scores[::-1]))
            gap = high[:, None] - low[None, :]
            total[k] += float(np.where(np.abs(gap) < 1e-9, 0.5, gap > 0).mean()) * int(held.sum())
    return total / len(fold)


def _weights(ahead: Any, signs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logistic regressions on matched pairs [swap, word], from one side minus the other, sparse [pair, word].

    `signs` [swap, pair] is 1 where the first side is taken for wanted. Each pair is given in both orders, so that there
    are rows of either label.
    """
    if not ahead.nnz:
        return np.zeros((len(signs), ahead.shape[1]))
    rows = sparse.csr_matrix(sparse.vstack([ahead, -ahead]))
    fit = LogisticRegression(fit_intercept=False, solver="liblinear").fit
    with config_context(assume_finite=True, skip_parameter_validation=True):  # many small fits: checks take the longest
        return np.concatenate([fit(rows, np.concatenate([sign, -sign]) > 0).coef_ for sign in signs])


def _folds(names: Sequence[Hashable], seed: int) -> NDArray[np.int64]:
    """Fold of each item: names are shuffled and dealt out, the most frequent first."""
    count = Counter(names)
    order = sorted(count, key=str)
    order = [order[i] for i in np.random.default_rng(seed).permutation(len(order))]
    place = {name: i % FOLDS for i, name in enumerate(sorted(order, key=lambda name: -count[name]))}
    return np.array([place[name] for name in names], dtype=np.int64)


def _scorer(behavior: Behavior, seed: int) -> Check:
    name = "scorer agrees"
    if not behavior.has_scorer:
        return Check(name=name, value=None, note="not all items have scoring patterns")
    hits = [i.judge(i.wanted) == "wanted" and i.judge(i.unwanted) == "unwanted" for i in behavior.items]
    found = stats.share(hits, [item.group for item in behavior.items], seed=seed)
    note = "share of items whose own answers are judged on their side"
    return Check(name=name, value=found.value, lower=found.lower, upper=found.upper, note=note)


def _asked(item: Item) -> str:
    return "\n".join(turn["content"] for turn in item.messages)


def _persona(item: Item, side: Side) -> str:
    return item.persona[side] if item.persona else ""


def _pair(item: Item) -> tuple[str, str]:
    return _persona(item, "wanted"), _persona(item, "unwanted")


def _prompt(item: Item, side: Side) -> str:
    return f"{_persona(item, side)}\n{_asked(item)}"


def _answer(item: Item, side: Side) -> str:
    return item.wanted if side == "wanted" else item.unwanted


def _status(passed: bool) -> Status:
    return "pass" if passed else "fail"


def _said(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _between(check: Check) -> str:
    return "" if check.lower is None else f"[{_said(check.lower)}, {_said(check.upper)}]"
