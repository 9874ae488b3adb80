"""The page of one run: what it says, what it escapes, and that no damage of the folder keeps it from being written."""

import json
import logging
import re

import pytest
from report.folders import Page, write_lines, write_run

from rlhf.errors import DataError
from rlhf.report.write import try_write_report, write_report

EVIL = "</div><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;\x00\x1b[31m\u202eabc\ud800 漢字 🙂"
ROWS = [
    {"step": 0, "val/accuracy": 0.25, "val/accuracy_low": 0.1, "val/accuracy_high": 0.5, "val/loss": 0.8},
    {"step": 1, "loss": 0.75, "learning_rate": 2e-6, "n_skipped": 0, "seconds": 9.0},
    {"step": 2, "loss": 0.5, "learning_rate": 1e-6, "n_skipped": 0, "seconds": 0.5}
    | {"val/accuracy": 0.75, "val/accuracy_low": 0.5, "val/accuracy_high": 0.9, "val/loss": 0.6},
]


def rollout(place: int, **other) -> dict:
    return {"step": 2, "row": place, "prompt": f"prompt {place}", "text": f"answer {place}", "reference": "4"} | {
        "reward": place / 10, "rewards": {"gsm8k": place / 5}, "advantage": place - 10.0, "n_tokens": 7,
        "finish_reason": "stop", **other,
    }  # fmt: skip


def test_what_a_page_says(tmp_path):
    page = Page(write_report(write_run(tmp_path / "run", ROWS, ["algorithm=dpo", "reward=[gsm8k,length]"])))
    assert "finished: 2 steps" in page.text
    assert "rlhf algorithm=dpo 'reward=[gsm8k,length]'" in page.text
    for told in (
        "DPO",
        "79,840 parameters",
        "1 of 1 × cpu (cpu)",
        "2 min 31 s",
        "random parameters",
        "2 steps over 48",
    ):
        assert told in page.text, told
    assert "seed: 3" in page.text  # the config
    assert "secret" not in page.text  # Hydra's own section
    assert re.search(r"unitstep 0step 2accuracyshare0\.250\.1 to 0\.50\.750\.5 to 0\.9loss0\.80\.6", page.text)
    assert "1 that did not change" in page.text  # n_skipped is no chart
    assert page.names.count("svg") == 4  # accuracy, loss, learning_rate, seconds
    assert "×10⁻⁶" in page.text
    assert "step" in page.text


def test_training_and_held_out_values_are_in_one_chart(tmp_path):
    page = Page(write_report(write_run(tmp_path, ROWS)))
    chart = re.search(r"<figcaption><b><a [^>]*>loss</a>.*?</svg>", page.source).group(0)
    assert ">training<" in chart
    assert ">held out<" in chart
    assert chart.count('fill="none"') > 2
    accuracy = re.search(r"<figcaption><b><a [^>]*>accuracy</a>.*?</svg>", page.source).group(0)
    assert 'fill-opacity="0.14"' in accuracy  # the interval
    assert ">share<" in accuracy  # the unit, from the table of metrics


def test_a_page_needs_nothing_else(tmp_path):
    write_lines(write_run(tmp_path, ROWS) / "samples.jsonl", [rollout(1)])
    page = Page(write_report(tmp_path))
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.names)
    assert not page.values("src")
    assert all(target.startswith("#") for target in page.values("href"))
    assert "default-src 'none'" in page.source
    assert not re.search(r"https?://|@import|url\(", page.source)
    targets = {target[1:] for target in page.values("href")}
    assert targets <= set(page.values("id"))


def test_texts_and_names_are_never_html(tmp_path):
    rows = [{"step": step, "loss": step, f"rewards/{EVIL}/mean": step * 0.5} for step in (1, 2)]
    run = write_run(tmp_path, rows, [f"name={EVIL[:40]}"], log=f"13:02:32 WARNING {EVIL[:60]}\n")
    samples = [rollout(i, prompt=EVIL, text=EVIL, rewards={EVIL: i}, finish_reason=EVIL, row=EVIL) for i in range(3)]
    write_lines(run / "samples.jsonl", [*samples, {"step": 2, "row": EVIL, "prompt": EVIL, "greedy": EVIL}])
    write_lines(run / "rows.jsonl", [{"row": 1, "prompt": EVIL, "completion": EVIL, "is_correct": True, EVIL: EVIL}])
    (run / "evaluation.json").write_text(json.dumps({"template": EVIL, "margins": {}, EVIL: 1.5}))
    page = Page(write_report(run))
    assert not {"script", "img"} & set(page.names)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 10
    assert "␀␛[31m⟨U+202E⟩abc? 漢字 🙂" in page.text


def test_the_best_and_the_worst_come_first(tmp_path):
    rows = [rollout(place) for place in (3, 19, 0, *range(4, 19), 1, 2)]
    rows += [rollout(30, reward="NaN", text="not judged"), rollout(50, step=1, text="early")]
    write_lines(write_run(tmp_path, ROWS) / "samples.jsonl", rows)
    page = Page(write_report(tmp_path))
    shown = re.findall(r"answer \d+|not judged|early|Best first|Worst first", page.text)
    best, worst = [f"answer {n}" for n in (19, 18, 17, 16, 15, 14)], [f"answer {n}" for n in (0, 1, 2, 3, 4)]
    assert shown == ["Best first", *best, "Worst first", "not judged", *worst, "Best first", "early"]
    assert "9 between them are not shown" in page.text
    assert re.search(r"reward 1\.9 · gsm8k 3\.8 · advantage \+9 · tokens 7 · end stop · row 19", page.text)
    assert "could not be judged · gsm8k" in page.text


def test_answers_to_held_out_prompts_over_time(tmp_path):
    rows = [
        {
            "step": step,
            "row": row,
            "prompt": f"question {row}",
            "greedy": f"{row} at {step}",
            "sampled": "",
            "answer": "4",
        }
        for step in range(0, 60, 10)
        for row in (7, 8)
    ]
    write_lines(write_run(tmp_path, ROWS) / "samples.jsonl", rows)
    text = Page(write_report(tmp_path)).text
    assert re.findall(r"7 at \d+", text) == ["7 at 0", "7 at 20", "7 at 30", "7 at 50"]
    assert text.count("question 7") == 1
    assert "(empty)" in text


def test_lines_that_are_no_rows_are_counted(tmp_path):
    broken = [
        "no json\n",
        "[1, 2]\n",
        {"step": "x", "loss": 9.0},
        {"step": 3, "loss": "NaN", "kl": None},
        '{"step": 4, "lo',
    ]
    page = Page(write_report(write_run(tmp_path, [*ROWS, *broken], n_steps=4)))
    assert "metrics.jsonl: 3 lines are no JSON object" in page.text
    assert "× 1 not finite" in page.text
    assert "the log ends after step 3 of 4: still going on, or killed" in page.text


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ("13:02:32 ERROR row 7 is bad\n", "failed after step 2 of 9: row 7 is bad"),
        (
            "13:02:32 ERROR the run failed\nTraceback (most recent call last):\n  File …\nZeroDivisionError: unlucky\n",
            "failed after step 2 of 9: ZeroDivisionError: unlucky",
        ),
        (
            "13:02:32 WARNING SIGTERM: stopped after step 2, checkpoint written; …\n",
            "stopped after step 2 of 9 by SIGTERM",
        ),
        ("13:02:32 ERROR row 7 is bad\n13:09:00 INFO devices: 1\n", "the log ends after step 2 of 9"),
    ],
    ids=["mistake", "bug", "signal", "gone on with"],
)
def test_how_a_run_ended(tmp_path, log, told):
    assert told in Page(write_report(write_run(tmp_path, ROWS, n_steps=9, log=log))).text


def test_a_run_that_failed_before_its_first_row(tmp_path):
    run = write_run(tmp_path, [], n_steps=9, log="13:02:32 ERROR no room\n")
    page = Page(write_report(run))
    assert "failed after step 0 of 9: no room" in page.text
    assert "svg" not in page.names
    (run / "log.txt").unlink()
    (run / ".hydra" / "config.yaml").write_text("a: [unclosed")
    assert "a: [unclosed" in Page(write_report(run)).text


def test_a_run_of_one_step_has_numbers_instead_of_charts(tmp_path):
    page = Page(write_report(write_run(tmp_path, ROWS[1:2], n_steps=1)))
    assert "svg" not in page.names
    assert re.search(r"loss.*0\.75", page.text)


def test_a_long_run_is_a_small_page(tmp_path):
    rows = [{"step": s, **{f"part{n}": (s * 37 % 101) / (n + 1) for n in range(60)}} for s in range(1, 501)]
    assert write_report(write_run(tmp_path, rows, n_steps=500)).stat().st_size < 300_000


def test_what_says_how_far_a_reward_model_can_be_trusted(tmp_path):
    trained = write_run(tmp_path / "rm", ROWS, log="13:03:00 INFO after the last step: head/scale 1.25\n")
    assert re.search(r"Measured after the last step.*head/scale1\.25", Page(write_report(trained)).text)
    run = write_run(tmp_path / "evaluation", [])
    config = {"seed": 0, "model": {"checkpoint": str(trained)}}
    (run / "config.json").write_text(json.dumps(config))
    share = {"n": 3, "accuracy": 0.5, "low": 0.2, "high": 0.8}
    result = {"rewards/accuracies": 0.9, "rewards/accuracies_low": 0.8, "rewards/accuracies_high": 0.95, "n_pairs": 6}
    result |= {"margins": {"edges": [-1.0, 0.0, 1.0, 2.0], "n": [1, 2, 3]}, "accuracy_by_length": {"as_long": share}}
    bins = [{"from": 0.5, "to": 0.6, "n": 4, "confidence": 0.55, "accuracy": 0.6}]
    result["calibration"] = {"expected_calibration_error": 0.125, "bins": bins}
    (run / "evaluation.json").write_text(json.dumps(result))
    page = Page(write_report(run))
    assert page.names.count("rect") == 3
    assert "1 to 2: 3" in page.text  # a bar
    assert "4 pairs: confidence 0.55, accuracy 0.6" in page.text
    assert "expected calibration error 0.125" in page.text
    assert "as long30.50.2 to 0.8" in page.text
    assert "0.90.8 to 0.95" in page.text
    assert "head/scale1.25" in page.text


def test_a_page_that_cannot_be_written_is_one_line_of_the_log(tmp_path, caplog):
    run = write_run(tmp_path, ROWS)
    (run / "report.html").mkdir()
    with caplog.at_level(logging.WARNING):
        try_write_report(run)
    (record,) = caplog.records
    assert re.fullmatch(r".*report\.html was not written: IsADirectoryError: .*", record.getMessage())
    assert not list(run.glob(".report*"))


def test_a_folder_without_anything_to_report(tmp_path, caplog):
    try_write_report(tmp_path)
    assert not list(tmp_path.iterdir())
    assert not caplog.records
    with pytest.raises(DataError, match=r"holds no run, sweep or pipeline: none of metrics\.jsonl"):
        write_report(tmp_path)
