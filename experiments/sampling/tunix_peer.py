"""Tunix's Sampler, float32: python tunix_peer.py rollout tiny|270m float32 ROUNDS"""

import sys

import shape
from tunix.generate.sampler import CacheConfig, Sampler
from tunix_model import new_model


class Words:
    """A text is its token ids, as words; the first of them is the beginning of the text."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 2

    def eos_id(self) -> int:
        return -1  # never drawn: answers go on to their full length

    def pad_id(self) -> int:
        return 0


def main(name: str, rounds: int) -> None:
    s = shape.SIZES[name]
    cache = CacheConfig(
        cache_size=shape.PROMPT + shape.NEW,
        num_layers=s.layers,
        num_kv_heads=s.kv_heads,
        head_dim=s.head_width,
    )
    sampler = Sampler(new_model(s), Words(), cache)
    texts = [Words().decode(ids[:-1]) for ids in shape.prompts(s, shape.ROWS, shape.PROMPT)]  # BOS is added

    def run():
        found = sampler(
            texts,
            max_generation_steps=shape.NEW,
            max_prompt_length=shape.PROMPT,
            temperature=shape.TEMPERATURE,
            top_k=shape.TOP_K,
            top_p=1.0,
            seed=0,
        )
        assert all(len(tokens) == shape.NEW for tokens in found.tokens)

    run()
    shape.say("ready")
    shape.report(tokens_per_second=shape.ROWS * shape.NEW / shape.seconds(run, rounds))


if __name__ == "__main__":
    main(sys.argv[2], int(sys.argv[4]))
