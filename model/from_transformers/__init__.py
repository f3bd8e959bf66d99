"""A Hugging Face transformers model's own parts on packed tokens."""
