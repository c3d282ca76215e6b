"""Hugging Face checkpoints: reading folders and ``.safetensors`` files, writing loadable folders."""
