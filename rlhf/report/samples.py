"""Texts: a batch's answers with their rewards, best and worst first; answers to held-out prompts as they change."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf.report.folder import ANSWERS, ROLLOUTS, SAMPLES, Run, as_number
from rlhf.report.html import MISSING, Html, element, folded, joined, number, section

_MOST_CHARACTERS = 1500  # of a text
_N_BEST = 6  # answers from each end
_N_PROMPTS = 6
_N_STEPS = 4  # of the answers to a held-out prompt


def samples(run: Run) -> Html:
    """Sections for what the run has of these."""
    rows = run.read_lines(SAMPLES)
    rollouts = [row for row in rows if "text" in row]
    held_out = [row for row in rows if "greedy" in row]
    kept = run.read_lines(ROLLOUTS)
    return joined(
        [
            section("Rollouts", *_rollouts(rollouts, SAMPLES)),
            section("Rollouts", *_rollouts([{"step": 0, **row} for row in kept], ROLLOUTS)),
            section("Answers to held-out prompts", *_held_out(held_out)),
            section("Evaluated answers", *_evaluated(run.read_lines(ANSWERS))),
        ]
    )


def _rollouts(rows: Sequence[Mapping[str, Any]], file: str) -> list[Html]:
    """The answers of the last batch that was kept, then those of the first."""
    steps = sorted({row["step"] for row in rows if isinstance(row.get("step"), int)})
    found = []
    for step in dict.fromkeys([*steps[-1:], *steps[:1]]):
        batch = [row for row in rows if row.get("step") == step]
        title = f"Batch of step {step:,}: {len(batch):,} answers, by reward" if step else f"{len(batch):,} answers"
        found.append(folded(title, _ends(batch, _rollout), is_open=step == steps[-1]))
    if len(steps) > 2:
        found.append(element("p", f"{len(steps) - 2} more batches are in {file}.", class_="soft"))
    return found


def _ends(rows: Sequence[Mapping[str, Any]], card: Callable[[Mapping[str, Any], str], Html]) -> Html:
    """Cards of the rows with the largest and the smallest rewards, and how many lie between."""
    order = sorted(rows, key=_reward, reverse=True)
    n_best = min(_N_BEST, (len(order) + 1) // 2)
    best, worst = order[:n_best], order[n_best:][-_N_BEST:][::-1]
    parts = [element("h3", "Best first"), element("div", *(card(row, "best") for row in best), class_="cards")]
    if worst:
        parts += [element("h3", "Worst first"), element("div", *(card(r, "worst") for r in worst), class_="cards")]
    left = len(order) - len(best) - len(worst)
    if left:
        parts.append(element("p", f"{left:,} between them are not shown.", class_="soft"))
    return joined(parts)


def _reward(row: Mapping[str, Any]) -> float:
    """To sort by: what could not be judged comes last."""
    found = as_number(row.get("reward")) if row.get("is_valid", True) else None
    return -math.inf if found is None or math.isnan(found) else float(found)


def _rollout(row: Mapping[str, Any], kind: str) -> Html:
    parts = row.get("rewards")
    named = parts.items() if isinstance(parts, Mapping) else ()
    facts = {
        "reward": "could not be judged" if _reward(row) == -math.inf else _number(row["reward"]),
        **{name: _number(value) for name, value in named},
        **({"advantage": _signed(row.get("advantage"))} if "advantage" in row else {}),
        "tokens": _number(row.get("n_tokens")),
        "end": row.get("finish_reason", MISSING),
        "row": row.get("row", MISSING),
    }
    return _card(kind, facts, row.get("prompt"), [("answer", row.get("text"))], row.get("reference"))


def _held_out(rows: Sequence[Mapping[str, Any]]) -> list[Html]:
    """Each prompt with its answers at a few steps."""
    by_row: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_row.setdefault(str(row.get("row")), []).append(row)
    cards = []
    for name, found in list(by_row.items())[:_N_PROMPTS]:
        answers = []
        for place in _spread(len(found), _N_STEPS):
            answers.append((f"step {found[place].get('step', MISSING)}, greedy", found[place].get("greedy")))
        answers.append((f"step {found[-1].get('step', MISSING)}, temperature 1", found[-1].get("sampled")))
        cards.append(_card("", {"row": name}, found[0].get("prompt"), answers, found[0].get("answer")))
    return [element("div", *cards, class_="cards")] if cards else []


def _spread(n: int, n_most: int) -> list[int]:
    """At most so many of n places, from the first to the last."""
    if n <= n_most:
        return list(range(n))
    return sorted({round(place * (n - 1) / (n_most - 1)) for place in range(n_most)})


def _evaluated(rows: Sequence[Mapping[str, Any]]) -> list[Html]:
    """Wrong answers first, then right ones; by reward where nothing says which are right."""
    if not rows:
        return []
    if all("is_correct" not in row for row in rows):
        return [_ends(rows, _answer)]
    found = []
    for title, kind, is_right in (("Wrong", "worst", False), ("Right", "best", True)):
        some = [row for row in rows if bool(row.get("is_correct")) == is_right]
        cards = element("div", *(_answer(row, kind) for row in some[: 2 * _N_BEST]), class_="cards")
        found.append(folded(f"{title}: {len(some):,} of {len(rows):,}", cards, is_open=not is_right))
    return found


def _answer(row: Mapping[str, Any], kind: str) -> Html:
    known = ("extracted", "expected", "reward", "n_tokens", "is_truncated", "row")
    facts = {key.replace("_", " "): _number(row[key]) for key in known if key in row}
    facts |= {key.removeprefix("rewards/"): _number(row[key]) for key in row if key.startswith("rewards/")}
    return _card(kind, facts, row.get("prompt"), [("answer", row.get("completion"))], None)


def _card(kind: str, facts: Mapping[str, Any], prompt: Any, answers: Sequence[tuple[str, Any]], reference: Any) -> Html:
    told = [element("span", element("b", name), f" {value}") for name, value in facts.items()]
    spaced = [part for fact in told for part in (fact, " · ")][:-1]
    texts = [("prompt", prompt, "text prompt"), *((name, text, "text") for name, text in answers)]
    if reference is not None:
        texts.append(("reference", reference, "text prompt"))
    shown = [part for name, text, c in texts for part in (element("div", name, class_="label"), _text(text, c))]
    return element("div", element("p", *spaced, class_="soft"), *shown, class_=f"card {kind}".rstrip())


def _text(value: Any, kind: str) -> Html:
    if value is None:
        return element("div", MISSING, class_=kind)
    text = str(value)
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:_MOST_CHARACTERS]}… ({len(text) - _MOST_CHARACTERS:,} characters more)"
    return element("div", text if text.strip() else f"{text}(empty)", class_=kind)


def _number(value: Any) -> str:
    found = as_number(value)
    return number(value if found is None else found)


def _signed(value: Any) -> str:
    found = as_number(value)
    return MISSING if found is None else f"{found:+.3g}"
