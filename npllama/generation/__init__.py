"""From logits to text: sampling, generation, and what is measured on the way (speed, perplexity)."""
