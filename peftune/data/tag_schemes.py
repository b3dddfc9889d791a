"""Entities in a row of tags, and where tags break the scheme they are written in."""

from __future__ import annotations

from collections.abc import Sequence


def _split_tag(tag: str) -> tuple[str, str]:
    """O -> ("O", ""); I-person -> ("I", "person"); person, of a scheme without prefixes -> ("", "person")."""
    prefix, dash, name = tag.partition("-")
    prefix = {"L": "E", "U": "S", "M": "I"}.get(prefix, prefix)  # as BILOU and BMES call them
    if dash and prefix in ("B", "I", "E", "S"):
        return prefix, name
    return ("O", "") if tag == "O" else ("", tag)


def read_tags(tags: Sequence[str], tokens: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The type of each entity of a row, a tag that continues nothing beginning one; and what breaks each scheme."""
    types: list[str] = []
    faults: dict[str, list[str]] = {"BIO": [], "BIOES": []}
    before = ("O", "")
    for number, (tag, token) in enumerate(zip((*tags, "O"), (*tokens, ""))):
        prefix, name = _split_tag(tag)
        wants_more, continues = before[0] in ("B", "I"), prefix in ("I", "E")
        fits = wants_more and name == before[1]
        after = f"after {tags[number - 1]}" if number else "at the start"
        said = f"{tag} {after} at token {number + 1} {token!r:.40}" if number < len(tags) else f"the end {after}"
        if continues and not fits:
            faults["BIO"].append(said)
        if (continues and not fits) or (wants_more and not continues):
            faults["BIOES"].append(said)
        if prefix in ("B", "S") or (continues and not fits) or (prefix == "" and before != (prefix, name)):
            types.append(name)
        before = (prefix, name)
    return types, faults
