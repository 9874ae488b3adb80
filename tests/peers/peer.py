"""Runs with the Python that has torch, transformers and peft: peer.py JOBS.json, a list of [what, arguments…].

Each job writes an .npz or .json file; nothing of this project is imported.
"""

import json
import sys

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer


def load(kind, folder):
    model, report = kind.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    wrong = {name: sorted(map(str, found)) for name, found in report.items() if found}
    assert not wrong, wrong
    return model.eval()


def text(folder, inputs, out, adapter=None):
    """Logits of a text model, with an adapter on it if one is given."""
    model = load(AutoModelForCausalLM, folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    given = {name: torch.tensor(x) for name, x in np.load(inputs).items()}
    with torch.no_grad():
        np.savez(out, logits=model(**given).logits.numpy())


def images(folder, inputs, out):
    """Logits of a model that sees."""
    model = load(AutoModelForImageTextToText, folder)
    given = {name: torch.tensor(x) for name, x in np.load(inputs).items()}
    with torch.no_grad():
        np.savez(out, logits=model(**given).logits.numpy())


def tokens(folder, inputs, out):
    """Token ids of texts, and of conversations by the chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open(inputs, encoding="utf-8") as stream:
        given = json.load(stream)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in given["texts"]]
    chats = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=chat[-1]["role"] == "user", return_dict=False)
        for chat in given["chats"]
    ]
    decoded = [tokenizer.decode(one, skip_special_tokens=True) for one in ids]
    with open(out, "w", encoding="utf-8") as stream:
        json.dump({"ids": ids, "chats": chats, "decoded": decoded}, stream)


def processor(folder, inputs, out):
    """What the processor makes of a question with a picture in it."""
    found = AutoProcessor.from_pretrained(folder)
    picture = np.load(inputs)["picture"]
    parts = ({"type": "text", "text": "Look:"}, {"type": "image", "image": picture})
    content = [*parts, {"type": "text", "text": "What is it?"}]
    made = found.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True,
        return_tensors="np",
    )  # fmt: skip
    np.savez(out, **{name: np.asarray(x) for name, x in made.items()})


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as stream:
        for what, *arguments in json.load(stream):
            globals()[what](*arguments)
