"""Hugging Face's formats: weights and tokenizers in, folders out, and the code that such a folder carries."""
