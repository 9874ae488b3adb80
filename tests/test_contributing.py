"""Every example of CONTRIBUTING.md, as a user would type it in."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = re.findall(r"```(?:python|yaml|json)\n# (\S+)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.findall(r"^`rlhf (.+)`$", TEXT, re.MULTILINE)


def test_there_is_an_example_of_each_kind():
    assert len(COMMANDS) == 4
    assert len(FILES) == 8


@pytest.mark.parametrize("words", COMMANDS)
def test_examples_run(words, command, small, tmp_path):
    for name, text in FILES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    typed = words.split()
    given = {word.split("=")[0] for word in typed}
    quick = [
        w for w in small if not w.startswith("dataset." if "dataset" in given else "-") and w.split("=")[0] not in given
    ]
    done = command(*typed, *quick, "hydra.run.dir=run")
    assert done.code == 0, done.output
    if "reward=[shouting,gsm8k]" in typed:
        assert "rewards/shouting/mean" in done.output


@pytest.mark.parametrize("group", ["algorithm", "model", "dataset", "reward"])
def test_the_readme_lists_every_choice(group):
    root = Path(__file__).resolve().parents[1]
    section = {"algorithm": "Algorithms", "model": "Models", "dataset": "Data", "reward": "Rewards"}[group]
    text = (root / "README.md").read_text(encoding="utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert listed == {path.stem for path in (root / "conf" / group).glob("*.yaml")}
