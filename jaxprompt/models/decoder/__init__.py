"""Decoder-only models: Llama, Mistral, Qwen2, SmolLM2."""
