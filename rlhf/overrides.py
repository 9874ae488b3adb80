"""The words of a command line, as Hydra has to see them."""

import os
import re


def with_absolute_config_path(words: list[str]) -> list[str]:
    """`-cp FOLDER` means a folder from where the command is typed; Hydra would look for it beside this file."""
    found = list(words)
    for place, word in enumerate(words):
        option, _, folder = word.partition("=")
        if option not in ("-cp", "--config-path"):
            continue
        if folder:
            found[place] = f"{option}={os.path.abspath(folder)}"
        elif place + 1 < len(words):
            found[place + 1] = os.path.abspath(words[place + 1])
    return found


def with_flags_first(words: list[str]) -> list[str]:
    """`-m` may stand between settings, which Hydra's parser would take for the end of them."""
    flags = [word for word in words if word in ("-m", "--multirun")]
    return flags[:1] + [word for word in words if word not in flags]


_WHOLE = re.compile(r"(\w+(\.\w+)+)=\{.*\b_target_\s*:.*", re.DOTALL)


def with_whole_values(words: list[str]) -> list[str]:
    """`KEY={_target_: …}` puts an object in the place of another, of which nothing stays; Hydra would merge the two."""
    found: list[str] = []
    for word in words:
        whole = _WHOLE.fullmatch(word)
        found += [f"{whole[1]}=null", word] if whole else [word]
    return found
