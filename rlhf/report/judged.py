"""What was measured apart from training: held-out metrics before and after, evaluations, reward models, comparisons."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.report.curves import named
from rlhf.report.definitions import unit_of
from rlhf.report.folder import COMPARISON, EVALUATION, Run, as_number
from rlhf.report.html import MISSING, Html, element, joined, number, section, table
from rlhf.report.svg import bar_chart, calibration_chart


def held_out(run: Run) -> Html | None:
    """The held-out metrics of the first and the last row that have them, with their intervals."""
    rows = [row for row in run.rows if any(name.startswith("val/") for name in row)]
    if not rows:
        return None
    names = [name for name in run.names if name.startswith("val/") and not name.endswith(("_low", "_high"))]
    lines = []
    for name in names:
        cells = [with_interval(row.get(name), row.get(f"{name}_low"), row.get(f"{name}_high")) for row in rows]
        lines.append((named(name.removeprefix("val/")), unit_of(name), cells[0], cells[-1]))
    first, last = (f"{row['step']:,}" for row in (rows[0], rows[-1]))
    if len(rows) == 1:
        return section("Held out", table(("", "unit", f"step {first}"), [line[:3] for line in lines], n_texts=2))
    return section("Held out, before and after", table(("", "unit", f"step {first}", f"step {last}"), lines, n_texts=2))


def with_interval(value: Any, low: Any, high: Any) -> Html:
    """A number, under it its 95 % interval where there is one."""
    shown = element("span", number(value))
    if as_number(low) is None or as_number(high) is None:
        return shown
    return joined([shown, element("span", f"{number(low)} to {number(high)}", class_="range")])


def measured_at_end(run: Run) -> Html | None:
    """What the log tells of the model after its last step: a reward model's shift and scale."""
    found = run.measured_at_end
    return section("Measured after the last step", _numbers(found)) if found else None


def evaluation(run: Run) -> Html | None:
    """The result of `task=evaluate`; of a reward model, how far it can be trusted."""
    result = run.read_json(EVALUATION)
    if not result:
        return None
    numbers = {name: value for name, value in result.items() if as_number(value) is not None}
    texts = {name: value for name, value in result.items() if isinstance(value, str) and name != "example"}
    facts = [joined([element("dt", name.replace("_", " ")), element("dd", value)]) for name, value in texts.items()]
    return joined(
        [
            section("Evaluation", _numbers(numbers), element("dl", *(element("div", fact) for fact in facts))),
            section("The reward model", *_reward_model(result, run)),
        ]
    )


def _numbers(found: Mapping[str, Any]) -> Html:
    ends = {f"{name}{end}" for name in found for end in ("_low", "_high")}
    rows = [
        (named(name), unit_of(name), with_interval(value, found.get(f"{name}_low"), found.get(f"{name}_high")))
        for name, value in found.items()
        if name not in ends
    ]
    return table(("", "unit", ""), rows, n_texts=2)


def _reward_model(result: Mapping[str, Any], run: Run) -> list[Html]:
    """Margins, calibration, accuracy by length and by group, shift and scale."""
    parts, charts = [], []
    margins, calibration = (_mapping(result.get(name)) for name in ("margins", "calibration"))
    if len(margins.get("edges", ())) > 1:
        chart = bar_chart(margins["edges"], margins["n"], "score of the better answer − of the worse one", "pairs")
        charts.append(_figure("Margins", "right of 0: the better answer has the larger score", chart))
    bins = [(part["confidence"], part["accuracy"], part["n"]) for part in calibration.get("bins", ())]
    if bins:
        error = f"expected calibration error {number(calibration.get('expected_calibration_error'))}"
        chart = calibration_chart(bins, "how sure the model is", "accuracy")
        charts.append(_figure("Calibration", f"{error}; on the dashed line it is as sure as it is right", chart))
    if charts:
        parts.append(element("div", *charts, class_="charts"))
    for key, title in (("accuracy_by_length", "by length"), ("accuracy_by_group", "by group")):
        rows = [
            (
                name.replace("_", " "),
                number(of.get("n")),
                with_interval(of.get("accuracy"), of.get("low"), of.get("high")),
            )
            for name, of in _mapping(result.get(key)).items()
        ]
        parts += [table((f"accuracy {title}", "pairs", "accuracy"), rows)] if rows else []
    head = _head(run) if parts else {}
    return [*parts, *([element("h3", "Normalisation"), _numbers(head)] if head else [])]


def _head(run: Run) -> dict[str, float]:
    """Shift and scale, from the log of the run whose checkpoint was evaluated."""
    checkpoint = run.setting("model.checkpoint")
    if not isinstance(checkpoint, str) or not Path(checkpoint).is_dir():
        return {}
    return Run(Path(checkpoint)).measured_at_end


def _figure(title: str, told: str, chart: Html) -> Html:
    caption = element("figcaption", element("b", title), element("span", told, class_="soft"))
    return element("figure", caption, chart)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def comparison(run: Run) -> Html | None:
    """The result of `task=compare`."""
    result = run.read_json(COMPARISON)
    rows = []
    for name, found in result.items():
        if not isinstance(found, Mapping) or "difference" not in found:
            continue
        change = with_interval(found["difference"], found.get("difference_low"), found.get("difference_high"))
        both = (number(found.get("baseline")), number(found.get("candidate")))
        rows.append((name, found.get("verdict", MISSING), number(found.get("n")), *both, change))
        if "win_rate" in found:
            wins = with_interval(found["win_rate"], found.get("win_rate_low"), found.get("win_rate_high"))
            verdict = found.get("win_rate_verdict", MISSING)
            rows.append((f"{name}: win rate", verdict, number(found.get("n")), "", "", wins))
    sides = [
        element("p", element("b", side), f": {result[side]}") for side in ("baseline", "candidate") if side in result
    ]
    heads = ("", "verdict", "n", "baseline", "candidate", "change")
    return section("Comparison", *sides, table(heads, rows, n_texts=2)) if rows else None
