"""A timm model's own parts on packed tokens."""
