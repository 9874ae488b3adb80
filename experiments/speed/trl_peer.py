"""TRL's SFT, DPO and GRPO trainers, float32, no gradient checkpointing: python trl_peer.py sft|dpo|grpo STEPS"""

import copy
import random
import sys
import tempfile

import shape
import trl
from datasets import Dataset
from torch_model import new_model
from transformers import TrainerCallback
from words import new_tokenizer, text


class _SaySteps(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        shape.say_step(state.global_step, state.max_steps)


def _settings(method: str, n_steps: int, folder: str) -> dict:
    return {
        "output_dir": folder,
        "max_steps": n_steps,
        "per_device_train_batch_size": shape.ROWS[method],
        "learning_rate": shape.LEARNING_RATE,
        **({} if method == "grpo" else {"max_length": shape.TIME}),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def _sft(n_steps: int, folder: str):
    rows = Dataset.from_dict({"input_ids": shape.token_rows(64, shape.TIME, 0)})
    args = trl.SFTConfig(**_settings("sft", n_steps, folder))
    return trl.SFTTrainer(
        new_model(shape.SIZE).train(), args=args, train_dataset=rows, processing_class=new_tokenizer()
    )


def _dpo(n_steps: int, folder: str):
    answer = shape.TIME - shape.PROMPT - 1  # an end token is added
    parts = {"prompt": shape.PROMPT, "chosen": answer, "rejected": answer}
    tokens = {name: shape.token_rows(64, length, seed) for seed, (name, length) in enumerate(parts.items())}
    rows = Dataset.from_dict({name: [text(row) + " " * (name == "prompt") for row in tokens[name]] for name in tokens})
    rows = rows.map(lambda row: {"chosen": row["chosen"] + " <eos>", "rejected": row["rejected"] + " <eos>"})
    args = trl.DPOConfig(beta=shape.BETA, **_settings("dpo", n_steps, folder))
    model = new_model(shape.SIZE).train()
    reference = copy.deepcopy(model)
    return trl.DPOTrainer(model, reference, args=args, train_dataset=rows, processing_class=new_tokenizer())


def _grpo(n_steps: int, folder: str):
    rows = Dataset.from_dict({"prompt": [text(row) for row in shape.token_rows(64, shape.ASKED, 0)]})
    draw = random.Random(0)
    settings = _settings("grpo", n_steps, folder) | {"per_device_train_batch_size": shape.ROWS["grpo"] * shape.SAMPLES}
    args = trl.GRPOConfig(
        num_generations=shape.SAMPLES, max_completion_length=shape.ANSWERED, beta=0.04, temperature=1.0, **settings
    )
    model = new_model(shape.SIZE).train()
    model.save_pretrained(folder)  # the trainer reads the reference by its name
    model.config._name_or_path = folder
    return trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(draw.random() < 0.5) for _ in completions],
        args=args,
        train_dataset=rows,
        processing_class=new_tokenizer(),
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trainer = {"sft": _sft, "dpo": _dpo, "grpo": _grpo}[sys.argv[1]](int(sys.argv[2]), folder)
        trainer.add_callback(_SaySteps())
        trainer.train()
