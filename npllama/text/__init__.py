"""From text to token ids and back: tokenizers and chat formats.

Importing this package loads nothing heavy; `npllama.text.tokenizer` imports tiktoken, and jinja2 is imported when a
chat template is first rendered.
"""
