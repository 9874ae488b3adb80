"""Any Python function as a reward: in a worker process, with a time limit."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.config import config
from rlhf.rewards.apart import Apart
from rlhf.rewards.base import Answered
from rlhf.rewards.pool import Function


@config
class Python(Apart):
    """`function(prompts, completions, fields, step)` returns a list with one number for each completion.

    function: its import path, `my_module.my_function`; modules beside the command are found. prompts: texts as the
    model saw them, control tokens spelt out. fields: the dataset's row of each, as a dict; images as the bytes of their
    files.
    """

    function: str

    def target(self):
        parameters = ("prompts", "completions", "fields", "step")
        return Function(self.function, parameters), f"reward.python.function={self.function}"

    def arguments(self, answers: Sequence[Answered], step: int):
        prompts, completions = [a.prompt for a in answers], [a.completion for a in answers]
        return prompts, completions, [plain(answer.fields) for answer in answers], step


def plain(value: Any) -> Any:
    """The value with nothing of this package in it, which a worker would have to import."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if type(value).__module__.split(".")[0] != "rlhf":
        return value
    return value.read() if hasattr(value, "read") else str(value)
