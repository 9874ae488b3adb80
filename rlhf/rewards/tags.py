"""Parts of a text between tags, `<answer>…</answer>`. Only searches for fixed texts: linear in the text's length."""

from collections.abc import Sequence


def inside(text: str, tag: str) -> str | None:
    """What is between the last closing of a tag and the opening before it; None without both."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if start < 0 else text[start + len(tag) + 2 : end]


def share_in_order(text: str, tags: Sequence[str]) -> float:
    """Share of the tags that stand there once, closed, with something in them, behind the one before."""
    found, place = 0, 0
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        start, end = text.find(opening), text.find(closing)
        is_single = text.count(opening) == 1 and text.count(closing) == 1
        if is_single and place <= start < end and text[start + len(opening) : end].strip():
            found += 1
            place = end + len(closing)
    return found / len(tags)


def is_only(text: str, tags: Sequence[str]) -> bool:
    """Whether nothing but the tags, in order, and white space between them is in the text."""
    place = 0
    for tag in tags:
        start, end = text.find(f"<{tag}>", place), text.find(f"</{tag}>", place)
        if start < 0 or end < start or text[place:start].strip():
            return False
        place = end + len(tag) + 3
    return not text[place:].strip()
