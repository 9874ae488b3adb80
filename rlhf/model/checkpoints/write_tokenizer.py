"""A SentencePiece model as the files that transformers loads a tokenizer from, with a chat template of our wording.

The merges of byte-pair encoding are not in a SentencePiece model, only the pieces with their ranks. Every way to make
a piece of two others is a merge, in the order of the pieces it makes (Sennrich et al., 2016, section 3.2: the pair
that was merged first is merged first).
"""

import json
import shutil
from pathlib import Path
from typing import Any

from rlhf.model.tokenizer import Tokenizer

IMAGE = "<image_soft_token>"
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6

# What `rlhf.model.chat` does, for text; of a message in parts, its images stand where they are.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(system='', turns=messages) -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set content = messages[0]['content'] -%}
  {%- set ns.system = (content if content is string else content[0]['text']) + '\\n\\n' -%}
  {%- set ns.turns = messages[1:] -%}
{%- endif -%}
{%- for turn in ns.turns -%}
  {%- if turn['role'] != ('user' if loop.index0 is even else 'assistant') -%}
    {{- raise_exception('roles must alternate user, assistant, ...') -}}
  {%- endif -%}
  {{- '<start_of_turn>' + ('user' if loop.index0 is even else 'model') + '\\n' -}}
  {{- ns.system if loop.first -}}
  {%- if turn['content'] is string -%}
    {{- turn['content'] | trim -}}
  {%- else -%}
    {%- for part in turn['content'] -%}
      {{- '<start_of_image>' if part['type'] == 'image' else part['text'] | trim -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{{- '<start_of_turn>model\\n' if add_generation_prompt -}}
"""


def copy(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy the SentencePiece model as `tokenizer.model`."""
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")


def write(tokenizer: Tokenizer, folder: Path, with_images: bool) -> None:
    """Write `tokenizer.model`, `tokenizer.json`, `tokenizer_config.json` and the template for processors."""
    copy(tokenizer, folder)
    text = json.dumps(_fast_form(tokenizer, with_images), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "GemmaTokenizer",
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk", "mask")},
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    if with_images:
        images = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": IMAGE}
        config |= {**images, "extra_special_tokens": images, "processor_class": "Gemma3Processor"}
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")


def _fast_form(tokenizer: Tokenizer, with_images: bool) -> dict[str, Any]:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.path.read_bytes())
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    vocabulary = {text: index for index, (text, _, _) in enumerate(pieces)}
    added = [
        _added(index, text, is_control=tokenizer.is_control(index))
        for index, (text, _, kind) in enumerate(pieces)
        if kind in (_UNKNOWN, _CONTROL, _USER)
    ]
    if with_images:
        added.append(_added(len(pieces), IMAGE, is_control=True))
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": place}} for place, name in enumerate("AB")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, texts[0]],
            "pair": [bos, texts[0], {"SpecialToken": {"id": "<bos>", "type_id": 1}}, texts[1]],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [tokenizer.bos], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(pieces),
        },
    }


def _added(index: int, text: str, is_control: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": index, "content": text, **flags, "normalized": "▁" in text, "special": is_control}


def _merges(pieces: list[tuple[str, float, int]]) -> list[list[str]]:
    scores = {text: score for text, score, kind in pieces if kind == _NORMAL}
    index = {text: place for place, (text, _, _) in enumerate(pieces)}
    found = []
    for text, score in scores.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                found.append((-score, index[left], index[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]
