"""Prompts unlike those that a direction was made and chosen on: other templates, on topics of their own.

A behaviour's card can name forms that are kept out of everything else (`Behavior.ood`). Where it names none and the
behaviour is in English, held-out items are put into frames that no item has: an e-mail, a ticket, a message typed in
haste. The topics are held out in either case.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from probes.behaviors import Behavior, Item

FRAMES = (
    "Subject: a request\n\nHello,\n\n{}\n\nMany regards, and thanks in advance,\nthe third floor",
    "[ticket 4121 | queue: general | state: open]\nrequester: guest\nmessage: {}\n[end of ticket]",
    "hey sorry typing this on the train, bad signal!! {} ... ok thx",
)


def out_of_distribution(behavior: Behavior, held: Behavior, fitted: Collection[str]) -> tuple[Behavior, str] | None:
    """Items of other templates on topics outside `fitted`, and what they are; None where there are none.

    Args:
        held: the held-out part of the behaviour, to be put into frames.
    """
    apart = tuple(item for item in behavior.ood if item.group not in fitted)
    if apart:
        forms = ", ".join(sorted({item.form for item in apart}))
        return replace(behavior, items=apart), f"forms kept apart ({forms}), on topics that were not fitted"
    if behavior.language == "en":
        items = tuple(framed(item, FRAMES[i % len(FRAMES)]) for i, item in enumerate(held.items))
        return replace(held, items=items), "held-out items inside an e-mail, a ticket or a message typed in haste"
    return None


def framed(item: Item, frame: str) -> Item:
    """The item with the user's last turn inside a frame."""
    *before, last = item.messages
    return replace(item, messages=(*before, {**last, "content": frame.format(last["content"])}))
