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


_SWEPT = re.compile(r"(\w+)=(?!['\"\[{(]).*,.*|(\w+)=(?:choice|glob)\(.*", re.DOTALL)
_MADE_OF_OTHERS = ("experiment", "pipeline", "task", "debug")  # a choice of these may set any key
_NO_VALUE = "choice|range|interval|glob|shuffle|sort|null$"  # sweeps already, and what no sweep may have
_PLAIN = re.compile(
    rf"(\+{{0,2}}(\w+)\.[\w.]+)=((?!{_NO_VALUE})[^\s,()][^,()]*|'[^']*'|\{{.*\}})",
    re.DOTALL,
)


def with_fixed_as_choices(words: list[str]) -> list[str]:
    """In a sweep over a group, a setting of that group as a sweep over one value.

    Hydra first composes what a sweep has in common, without what is swept: `algorithm.beta=0.2` would meet the default
    algorithm there, which has no beta.
    """
    if "-m" not in words and "--multirun" not in words:
        return words
    swept = {found[1] or found[2] for word in words if (found := _SWEPT.fullmatch(word))}
    if not swept:
        return words
    is_any = bool(swept.intersection(_MADE_OF_OTHERS))

    def of(word: str) -> str:
        found = _PLAIN.fullmatch(word)
        is_meant = found and found[2] != "hydra" and (is_any or found[2] in swept)
        return f"{found[1]}=choice({found[3]})" if found and is_meant else word

    return [of(word) for word in words]


_QUOTABLE = re.compile(r"([~+]{0,2}[\w.@/]+)=([^'\"\[\]{}(),$\\]+)", re.DOTALL)


def with_quotes(words: list[str]) -> list[str]:
    """Quotes around plain values with letters that Hydra reads in quotes only: those beyond ASCII, and ~."""

    def of(word: str) -> str:
        found = _QUOTABLE.fullmatch(word)
        needs_quotes = found and (not found[2].isascii() or "~" in found[2])
        return f"{found[1]}='{found[2]}'" if found and needs_quotes else word

    return [of(word) for word in words]
