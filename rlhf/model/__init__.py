"""Gemma 3: architecture, parameters, tokenizer, chat template and checkpoint formats."""
