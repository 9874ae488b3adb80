"""Tunix's PeftTrainer (all parameters) and DPOTrainer, float32: python tunix_peer.py sft|dpo STEPS"""

import sys

import jax
import numpy as np
import optax
import shape
from tunix.sft import peft_trainer
from tunix.sft.dpo import dpo_trainer
from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask
from tunix_model import new_model


class _SaySteps:
    """Says a step when its loss is there; before the trainer's own class in the order of methods."""

    def _buffer_metrics(self, buffer, loss, step, additional_metrics=None):
        jax.block_until_ready(loss)
        shape.say_step(step + 1, self.config.max_steps)
        return super()._buffer_metrics(buffer, loss, step, additional_metrics)


class _Sft(_SaySteps, peft_trainer.PeftTrainer): ...


class _Dpo(_SaySteps, dpo_trainer.DPOTrainer): ...


def _optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(shape.LEARNING_RATE, weight_decay=0.0))


def _array(n_tokens: int, rows: int, seed: int) -> np.ndarray:
    return np.array(shape.token_rows(rows, n_tokens, seed), np.int32)


def _sft(n_steps: int) -> None:
    trainer = _Sft(
        new_model(shape.SIZE), _optimizer(), peft_trainer.TrainingConfig(eval_every_n_steps=n_steps, max_steps=n_steps)
    )

    def inputs(batch):
        mask = batch.input_mask
        positions, attention = build_positions_from_mask(mask), make_causal_attn_mask(mask)
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": mask,
            "positions": positions,
            "attention_mask": attention,
        }

    shown = np.ones((shape.ROWS["sft"], shape.TIME), bool)
    rows = (
        peft_trainer.TrainingInput(input_tokens=_array(shape.TIME, shape.ROWS["sft"], seed), input_mask=shown)
        for seed in range(n_steps)
    )
    trainer.with_gen_model_input_fn(inputs).train(rows)


def _dpo(n_steps: int) -> None:
    pairs, answer = shape.ROWS["dpo"], shape.TIME - shape.PROMPT
    settings = dpo_trainer.DPOTrainingConfig(beta=shape.BETA, eval_every_n_steps=n_steps, max_steps=n_steps)
    shown = {name: np.ones((pairs, n), np.int32) for name, n in (("prompt", shape.PROMPT), ("answer", answer))}
    rows = (
        dpo_trainer.TrainingInput(
            prompt_ids=_array(shape.PROMPT, pairs, 3 * seed),
            prompt_mask=shown["prompt"],
            chosen_ids=_array(answer, pairs, 3 * seed + 1),
            chosen_mask=shown["answer"],
            rejected_ids=_array(answer, pairs, 3 * seed + 2),
            rejected_mask=shown["answer"],
        )
        for seed in range(n_steps)
    )
    _Dpo(new_model(shape.SIZE), new_model(shape.SIZE), _optimizer(), settings).train(rows)


if __name__ == "__main__":
    {"sft": _sft, "dpo": _dpo}[sys.argv[1]](int(sys.argv[2]))
